//! RAM images: files of known content, in memory if the host has a file system there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fastrand::Rng;
use tempfile::TempDir;
use xxhash_rust::xxh3::Xxh3;

use crate::Fallible;

const PAGE: usize = 4096;
/// Used pages of a mostly empty image lie in clusters of 32.
const CLUSTER: usize = 32 * PAGE;
/// The unit in which images are written and hashed.
pub(crate) const CHUNK: usize = 1 << 20;

/// The content of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Random bytes.
    Incompressible,
    /// Text.
    Text,
    /// The first half random bytes, the second half text.
    Halves,
    /// Text in 5 % of the pages, in clusters; zeros are written to the others.
    MostlyZero,
    /// The same, but the other pages are never written.
    Sparse,
    /// Nothing is ever written.
    Untouched,
}

impl Content {
    /// All kinds of content.
    pub(crate) const ALL: [Self; 6] =
        [Self::Incompressible, Self::Text, Self::Halves, Self::MostlyZero, Self::Sparse, Self::Untouched];

    /// The name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Incompressible => "incompressible",
            Self::Text => "text",
            Self::Halves => "half incompressible, half text",
            Self::MostlyZero => "mostly zero, 5 % used",
            Self::Sparse => "sparse, 5 % used",
            Self::Untouched => "untouched",
        }
    }

    /// Can compressors reduce it?
    pub(crate) fn compresses(self) -> bool {
        matches!(self, Self::Text | Self::Halves)
    }
}

/// An image. The file is deleted with the folder that contains it.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    content: Content,
    bytes: u64,
    allocated: u64,
    hash: u128,
}

impl Image {
    /// Creates an image in a folder.
    pub(crate) fn create(folder: &Path, content: Content, bytes: u64) -> Fallible<Self> {
        let mut image = Self { path: folder.join("image"), content, bytes, allocated: 0, hash: 0 };
        image.write()?;
        image.allocated = image.allocated_now()?;
        image.hash = image.hash_of(&image.path)?;
        Ok(image)
    }

    /// Restores the holes that a reader has filled: a read of a hole through a mapping allocates it on such a file
    /// system.
    pub(crate) fn restore(&self) -> Fallible<()> {
        if self.allocated_now()? != self.allocated { self.write() } else { Ok(()) }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its content.
    pub(crate) fn content(&self) -> Content {
        self.content
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the file that are allocated.
    pub(crate) fn allocated(&self) -> u64 {
        self.allocated
    }

    /// Fails unless the image that arrived equals this one.
    pub(crate) fn check(&self, hash: u128) -> Fallible<()> {
        if hash == self.hash { Ok(()) } else { Err("what arrived is not the image".into()) }
    }

    /// The hash of a file that should have the same content.
    pub(crate) fn hash_of(&self, path: &Path) -> Fallible<u128> {
        let (mut file, mut hash, mut chunk) = (File::open(path)?, Xxh3::new(), vec![0; CHUNK]);
        for _ in 0..self.bytes / CHUNK as u64 {
            file.read_exact(&mut chunk)?;
            hash.update(&chunk);
        }
        Ok(hash.digest128())
    }

    fn allocated_now(&self) -> Fallible<u64> {
        Ok(self.path.metadata()?.blocks() * 512)
    }

    fn write(&self) -> Fallible<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&self.path)?;
        file.set_len(self.bytes)?;
        let (mut source, mut chunk) = (Source::new(), vec![0; CHUNK]);
        for start in (0..self.bytes).step_by(CHUNK) {
            match self.content {
                Content::Untouched => return Ok(()),
                Content::Incompressible => source.noise(&mut chunk),
                Content::Halves if start < self.bytes / 2 => source.noise(&mut chunk),
                Content::Text | Content::Halves => source.text(&mut chunk),
                Content::MostlyZero | Content::Sparse => {
                    self.write_clusters(&mut file, start, &mut source)?;
                    continue;
                }
            }
            file.write_all(&chunk)?;
        }
        Ok(())
    }

    /// One cluster in twenty is used.
    fn write_clusters(&self, file: &mut File, start: u64, source: &mut Source) -> Fallible<()> {
        let mut cluster = vec![0; CLUSTER];
        for at in (start..start + CHUNK as u64).step_by(CLUSTER) {
            let is_used = source.noise.u64(..20) == 0;
            if is_used {
                source.text(&mut cluster);
            } else if self.content == Content::Sparse {
                continue;
            } else {
                cluster.fill(0);
            }
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&cluster)?;
        }
        Ok(())
    }
}

/// A folder for images and sockets, deleted when the value is dropped; in memory if this host has a file system
/// there.
pub(crate) fn folder() -> Fallible<TempDir> {
    let shared_memory = Path::new("/dev/shm");
    let place = if shared_memory.is_dir() { shared_memory.to_owned() } else { std::env::temp_dir() };
    remove_orphans(&place)?;
    Ok(tempfile::Builder::new().prefix(&format!("{FOLDER}{}-", std::process::id())).tempdir_in(place)?)
}

/// The prefix of such folders' names; the pid of the process that made them follows.
const FOLDER: &str = "memferry-peers-";

/// Removes the images of a bench that was killed, because they occupy memory.
fn remove_orphans(place: &Path) -> Fallible<()> {
    for entry in std::fs::read_dir(place)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(FOLDER).and_then(|rest| rest.split_once('-')).map(|(owner, _)| owner);
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
            // A folder of another user stays.
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
    Ok(())
}

/// The source of content, always the same.
struct Source {
    noise: Rng,
    words: Vec<u8>,
}

impl Source {
    fn new() -> Self {
        let mut source = Self { noise: Rng::with_seed(1), words: Vec::with_capacity(CHUNK) };
        let words: Vec<&[u8]> = WORDS.split(' ').map(str::as_bytes).collect();
        while source.words.len() < CHUNK {
            let word = words[source.noise.usize(..words.len())];
            source.words.extend_from_slice(word);
            let end = if source.noise.usize(..12) == 0 { b'\n' } else { b' ' };
            source.words.push(end);
        }
        source
    }

    fn noise(&mut self, into: &mut [u8]) {
        self.noise.fill(into);
    }

    /// Fills each page with a passage of the text, starting anywhere in it.
    fn text(&mut self, into: &mut [u8]) {
        for page in into.chunks_exact_mut(PAGE) {
            let start = self.noise.usize(..self.words.len() - PAGE);
            page.copy_from_slice(&self.words[start..start + PAGE]);
        }
    }
}

const WORDS: &str = "a about accept address after all an and any are as at be because been before began block both but by \
    cache can channel come could did do down each end error every find first for frame from get give go good guest had \
    has have he her him his how if in info into is it its kernel know last like little log long look made make many may \
    memory migration more most must my never new no not now number of on one only or other our out over page part people \
    process queue read receive request return round said same see send she should so some source stage state such take \
    than that the their them then there these they thing this time to two up upon us used value very wait was way we \
    well went were what when where which while who will with word work would write year you your";
