//! The destination's side: images and state files that are written under temporary names, and take their place when the
//! guest starts.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{FileMemory, GuestMemory, RamBlock};
use memferry_stages::untrusted::listed;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::commands;
use super::settings::{FileGuestSettings, Image};
use super::state;
use crate::guest::{GuestError, GuestState, RunState};

/// A file guest that is to arrive. Dropped before its start, it leaves no file behind.
#[derive(Debug)]
pub(super) struct Destination {
    settings: FileGuestSettings,
    built: Mutex<Option<Built>>,
}

#[derive(Debug)]
struct Built {
    memory: GuestMemory,
    images: Vec<Arc<FileMemory>>,
    /// The images, and the state files when they have come.
    files: Vec<Partial>,
}

/// A file under a temporary name, beside the place that it will take.
#[derive(Debug)]
struct Partial {
    temporary: PathBuf,
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

    /// Creates a sparse file for every block, and sees that there is a place for every state file that is to come.
    pub(super) fn build(
        &self,
        page_size: PageSize,
        blocks: &[BlockInfo],
        setup: &GuestState,
    ) -> Result<(), GuestError> {
        if self.built().is_some() {
            return Err(GuestError("the images are created already".into()));
        }
        let targets = self.targets(blocks)?;
        state::of_files("setup", setup, &self.settings.state_files)?;
        targets.iter().copied().chain(&self.settings.state_files).try_for_each(|file| self.check_target(&file.path))?;
        let (mut files, mut images, mut as_blocks) = (Vec::new(), Vec::new(), Vec::new());
        for (image, block) in targets.into_iter().zip(blocks) {
            let (partial, memory) = Partial::image(&image.path, block.length)?;
            files.push(partial);
            images.push(memory.clone());
            // An image is made here, so it is not the source's own: the engine refuses a source that says it is.
            let info = BlockInfo { ignored: false, ..block.clone() };
            as_blocks.push(RamBlock { info, memory, fresh: true });
        }
        let memory = GuestMemory::new(page_size, as_blocks).map_err(|error| GuestError(error.to_string()))?;
        *self.built() = Some(Built { memory, images, files });
        Ok(())
    }

    /// Returns when every image and every state file is on the disk.
    pub(super) fn prepare(&self, device: &GuestState) -> Result<(), GuestError> {
        let mut built = self.built();
        let built = built.as_mut().ok_or_else(not_built)?;
        let state_files = &self.settings.state_files;
        for (file, section) in state_files.iter().zip(state::of_files("device", device, state_files)?) {
            built.files.push(Partial::state_file(&file.path, &section.bytes)?);
        }
        built.images.iter().try_for_each(|image| image.sync()).map_err(|error| GuestError(error.to_string()))
    }

    /// Gives every file its name, then runs the start command.
    pub(super) fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        let mut built = self.built();
        place(&mut built.as_mut().ok_or_else(not_built)?.files, self.settings.overwrite)?;
        let Some(start) = self.settings.start.as_ref().filter(|_| run_state == RunState::Running) else {
            return Ok(());
        };
        commands::run("start", start, self.settings.command_timeout)
            .map_err(|error| GuestError(format!("the images are complete and in place, but {error}")))
    }

    /// The image of each block, in the order of the blocks.
    fn targets(&self, blocks: &[BlockInfo]) -> Result<Vec<&Image>, GuestError> {
        let image = |block: &BlockInfo| self.settings.images.iter().find(|image| block.id == image.id);
        let found: Option<Vec<_>> = blocks.iter().map(image).collect();
        found.filter(|found| found.len() == self.settings.images.len()).ok_or_else(|| {
            let came = listed(blocks.iter().map(|block| &block.id));
            let own: Vec<_> = self.settings.images.iter().map(|image| &image.id).collect();
            GuestError(format!("blocks [{came}] came, there are images for {own:?}: each block needs its image"))
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
    fn image(target: &Path, length: u64) -> Result<(Self, Arc<FileMemory>), GuestError> {
        let temporary = temporary_of(target)?;
        let memory = FileMemory::create(&temporary, length).map_err(|error| GuestError(error.to_string()))?;
        Ok((Self::new(temporary, target), Arc::new(memory)))
    }

    /// On the disk when this returns.
    fn state_file(target: &Path, bytes: &[u8]) -> Result<Self, GuestError> {
        let temporary = temporary_of(target)?;
        let named = |error| GuestError::caused(format_args!("{}: cannot be written", temporary.display()), error);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let (mut file, partial) = (file.map_err(named)?, Self::new(temporary.clone(), target));
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(named)?;
        Ok(partial)
    }

    fn new(temporary: PathBuf, target: &Path) -> Self {
        Self { temporary, target: target.into(), is_placed: false }
    }

    fn place(&mut self, overwrite: bool) -> io::Result<()> {
        if overwrite {
            std::fs::rename(&self.temporary, &self.target)?;
        } else {
            rename_to_nothing(&self.temporary, &self.target)?;
        }
        self.is_placed = true;
        Ok(())
    }

    /// Takes the file out of its place again.
    fn displace(&mut self) -> io::Result<()> {
        rename_to_nothing(&self.target, &self.temporary)?;
        self.is_placed = false;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_placed {
            // There is nobody left to tell, and the name says what it is.
            drop(std::fs::remove_file(&self.temporary));
        }
    }
}

/// The name beside a file under which it is written.
fn temporary_of(target: &Path) -> Result<PathBuf, GuestError> {
    let name = target.file_name().ok_or_else(|| GuestError(format!("{} names no file", target.display())))?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".memferry-{:08x}.partial", RandomState::new().hash_one(target) >> 32));
    Ok(target.with_file_name(temporary))
}

/// Places all files or, where none may be replaced, none. What was replaced cannot be brought back.
fn place(files: &mut [Partial], overwrite: bool) -> Result<(), GuestError> {
    for index in 0..files.len() {
        let Err(error) = files[index].place(overwrite) else { continue };
        let failed = format!("{} cannot take its place: {error}", files[index].target.display());
        let placed = &mut files[..index];
        if overwrite || placed.iter_mut().any(|file| file.displace().is_err()) {
            let names: Vec<_> = placed.iter().filter(|file| file.is_placed).map(|file| &file.target).collect();
            return Err(GuestError(format!("{failed}; in place are {names:?}")));
        }
        return Err(GuestError(failed));
    }
    let folders: BTreeSet<_> = files.iter().map(|file| folder(&file.target)).collect();
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
