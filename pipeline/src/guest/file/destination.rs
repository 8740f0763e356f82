//! The destination's side: images that are written under temporary names, and take their place when the guest starts.

use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{FileMemory, GuestMemory, RamBlock};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::commands;
use super::settings::{FileGuestSettings, Image};
use crate::guest::{GuestError, RunState};

/// A file guest that is to arrive. Dropped before its start, it leaves no file behind.
#[derive(Debug)]
pub(super) struct Destination {
    settings: FileGuestSettings,
    built: Mutex<Option<Built>>,
}

#[derive(Debug)]
struct Built {
    memory: GuestMemory,
    images: Vec<Partial>,
}

/// An image that is being written.
#[derive(Debug)]
struct Partial {
    memory: Arc<FileMemory>,
    target: PathBuf,
    is_placed: bool,
}

impl Destination {
    pub(super) fn new(settings: FileGuestSettings) -> Result<Self, GuestError> {
        settings.validate()?;
        Ok(Self { settings, built: Mutex::new(None) })
    }

    pub(super) fn memory(&self) -> Option<GuestMemory> {
        self.built().as_ref().map(|built| built.memory.clone())
    }

    /// Creates a sparse file for every block.
    pub(super) fn build(&self, page_size: PageSize, blocks: &[BlockInfo]) -> Result<(), GuestError> {
        if self.built().is_some() {
            return Err(GuestError("the images are created already".into()));
        }
        let targets = self.targets(blocks)?;
        targets.iter().try_for_each(|image| self.check_target(&image.path))?;
        let create = |(image, block): (&&Image, &BlockInfo)| Partial::create(&image.path, block.length);
        let images: Vec<_> = targets.iter().zip(blocks).map(create).collect::<Result<_, _>>()?;
        let as_block = |(info, partial): (&BlockInfo, &Partial)| RamBlock {
            // An image is made here, so it is not the source's own: the engine refuses a source that says it is.
            info: BlockInfo { ignored: false, ..info.clone() },
            memory: partial.memory.clone(),
            fresh: true,
        };
        let blocks = blocks.iter().zip(&images).map(as_block).collect();
        let memory = GuestMemory::new(page_size, blocks).map_err(|error| GuestError(error.to_string()))?;
        *self.built() = Some(Built { memory, images });
        Ok(())
    }

    /// Returns when every image is on the disk.
    pub(super) fn prepare(&self) -> Result<(), GuestError> {
        let built = self.built();
        let built = built.as_ref().ok_or_else(not_built)?;
        built.images.iter().try_for_each(|image| image.memory.sync()).map_err(|error| GuestError(error.to_string()))
    }

    /// Gives every image its name, then runs the start command.
    pub(super) fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        let mut built = self.built();
        place(&mut built.as_mut().ok_or_else(not_built)?.images, self.settings.overwrite)?;
        let Some(start) = self.settings.start.as_ref().filter(|_| run_state == RunState::Running) else {
            return Ok(());
        };
        commands::run("start", start, self.settings.command_timeout)
            .map_err(|error| GuestError(format!("the images are complete and in place, but {error}")))
    }

    /// The image of each block, in the order of the blocks.
    fn targets(&self, blocks: &[BlockInfo]) -> Result<Vec<&Image>, GuestError> {
        let image = |block: &BlockInfo| self.settings.images.iter().find(|image| image.id == block.id);
        let found: Option<Vec<_>> = blocks.iter().map(image).collect();
        found.filter(|found| found.len() == self.settings.images.len()).ok_or_else(|| {
            let came: Vec<_> = blocks.iter().map(|block| &block.id).collect();
            let own: Vec<_> = self.settings.images.iter().map(|image| &image.id).collect();
            GuestError(format!("blocks {came:?} came, there are images for {own:?}: each block needs its image"))
        })
    }

    fn check_target(&self, path: &Path) -> Result<(), GuestError> {
        match path.symlink_metadata() {
            Ok(found) if found.is_dir() => Err(GuestError(format!("{} is a folder", path.display()))),
            Ok(found) if !found.is_file() && !found.is_symlink() => {
                Err(GuestError(format!("{} is no regular file, and stays: name another", path.display())))
            }
            Ok(_) if !self.settings.overwrite => {
                Err(GuestError(format!("{} exists: remove it, or set overwrite = true", path.display())))
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(GuestError::caused(path.display(), error)),
            _ => Ok(()),
        }
    }

    fn built(&self) -> MutexGuard<'_, Option<Built>> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_built() -> GuestError {
    GuestError("the images are not created yet".into())
}

impl Partial {
    fn create(target: &Path, length: u64) -> Result<Self, GuestError> {
        let name = target.file_name().ok_or_else(|| GuestError(format!("{} names no file", target.display())))?;
        let mut temporary = name.to_owned();
        temporary.push(format!(".memferry-{:08x}.partial", RandomState::new().hash_one(target) >> 32));
        let memory = FileMemory::create(&target.with_file_name(temporary), length);
        let memory = memory.map_err(|error| GuestError(error.to_string()))?;
        Ok(Self { memory: Arc::new(memory), target: target.into(), is_placed: false })
    }

    fn place(&mut self, overwrite: bool) -> io::Result<()> {
        let from = self.memory.path();
        if overwrite {
            std::fs::rename(from, &self.target)?;
        } else {
            rename_to_nothing(from, &self.target)?;
        }
        self.is_placed = true;
        Ok(())
    }

    /// Takes the image out of its place again.
    fn displace(&mut self) -> io::Result<()> {
        rename_to_nothing(&self.target, self.memory.path())?;
        self.is_placed = false;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_placed {
            // There is nobody left to tell, and the name says what it is.
            drop(std::fs::remove_file(self.memory.path()));
        }
    }
}

/// Places all images or, where none may be replaced, none. What was replaced cannot be brought back.
fn place(images: &mut [Partial], overwrite: bool) -> Result<(), GuestError> {
    for index in 0..images.len() {
        let Err(error) = images[index].place(overwrite) else { continue };
        let failed = format!("{} cannot take its place: {error}", images[index].target.display());
        let placed = &mut images[..index];
        if overwrite || placed.iter_mut().any(|image| image.displace().is_err()) {
            let names: Vec<_> = placed.iter().filter(|image| image.is_placed).map(|image| &image.target).collect();
            return Err(GuestError(format!("{failed}; in place are {names:?}")));
        }
        return Err(GuestError(failed));
    }
    let folders: BTreeSet<_> = images.iter().map(|image| folder(&image.target)).collect();
    folders.into_iter().try_for_each(|folder| {
        let synced = File::open(folder).and_then(|open| open.sync_all());
        synced.map_err(|error| {
            GuestError::caused(format_args!("the images are in place, but {}", folder.display()), error)
        })
    })
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Renames, and fails if there is something of the name already; where the file system cannot promise that, it was
/// looked at before.
fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) if to.symlink_metadata().is_err() => std::fs::rename(from, to),
        done => done.map_err(io::Error::from),
    }
}
