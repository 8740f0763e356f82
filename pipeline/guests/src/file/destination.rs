//! The destination: images and state files are written under temporary names, and renamed into place when the guest
//! starts.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{FileMemory, GuestMemory, RamBlock};
use memferry_stages::untrusted::{Untrusted, listed};
use memferry_transports::temporary::{Temporary, remove_abandoned, target_of};

use super::commands;
use super::settings::{FileGuestSettings, Image};
use super::state;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState};

/// How many images are made durable at a time.
const SYNCS_AT_A_TIME: usize = 16;

/// Creates images for the received blocks.
#[derive(Debug)]
pub struct FileBuilder {
    settings: FileGuestSettings,
}

/// Images that were created. If dropped before the start, they leave no file behind.
#[derive(Debug)]
pub struct FileDestination {
    settings: FileGuestSettings,
    memory: GuestMemory,
    images: Vec<Arc<FileMemory>>,
    /// The images, and the state files once they are received.
    files: Mutex<Vec<Temporary>>,
}

/// Could these files be received?
pub(super) fn check(settings: FileGuestSettings) -> Result<(), GuestError> {
    settings.validate()?;
    FileBuilder { settings }.check_targets()
}

impl GuestBuilder for FileBuilder {
    type Built = FileDestination;

    /// Creates a sparse file for every block, and checks that there is a place for every state file that will come.
    fn build(
        self,
        page_size: PageSize,
        blocks: &[BlockInfo],
        setup: &GuestState,
    ) -> Result<Arc<FileDestination>, GuestError> {
        let targets = self.targets(blocks)?;
        state::of_files("setup", setup, &self.settings.state_files)?;
        self.check_targets()?;
        let (mut files, mut images, mut as_blocks) = (Vec::new(), Vec::new(), Vec::new());
        for (image, block) in targets.into_iter().zip(blocks) {
            let (temporary, memory) = self::image(&image.path, block.length)?;
            files.push(temporary);
            images.push(memory.clone());
            // An image is created here, so it cannot be the source's own: the engine refuses a source that says it is.
            let info = BlockInfo { ignored: false, ..block.clone() };
            as_blocks.push(RamBlock { info, memory, fresh: true });
        }
        let memory = GuestMemory::new(page_size, as_blocks).map_err(|error| GuestError(error.to_string()))?;
        Ok(Arc::new(FileDestination { settings: self.settings, memory, images, files: Mutex::new(files) }))
    }
}

impl Guest for FileDestination {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Err(GuestError("images are read by another program, whose access to a page that is missing nobody sees".into()))
    }
}

impl DestinationGuest for FileDestination {
    fn make_durable(&self) -> Result<(), GuestError> {
        let written: Vec<_> = self.images.iter().filter(|image| image.is_written()).collect();
        let sync = |images: &[&Arc<FileMemory>]| images.iter().try_for_each(|image| image.sync());
        // Each waits for the disk. Those that wait at the same time are written in one commit of the file system.
        std::thread::scope(|scope| {
            let shares = written.chunks(written.len().div_ceil(SYNCS_AT_A_TIME).max(1));
            let syncs: Vec<_> = shares.map(|share| scope.spawn(move || sync(share))).collect();
            syncs.into_iter().try_for_each(|sync| sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
        .map_err(|error| GuestError(error.to_string()))
    }

    /// Returns when every image and every state file is on disk.
    fn prepare(&self, device: &GuestState) -> Result<(), GuestError> {
        let mut files = self.files();
        let state_files = &self.settings.state_files;
        for (file, section) in state_files.iter().zip(state::of_files("device", device, state_files)?) {
            files.push(state_file(&file.path, &section.bytes)?);
        }
        // Nothing is left where the images were made durable before.
        self.make_durable()
    }

    /// The state files come again. The images stay where they were loaded.
    fn unprepare(&self) -> Result<(), GuestError> {
        self.files().truncate(self.images.len());
        Ok(())
    }

    /// Renames every file into place, then runs the start command.
    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        place(&self.files(), self.settings.overwrite)?;
        let Some(start) = self.settings.start.as_ref().filter(|_| run_state == RunState::Running) else {
            return Ok(());
        };
        commands::run("start", start, self.settings.command_timeout)
            .map_err(|error| GuestError(format!("the images are complete and in place, but {error}")))
    }
}

impl FileDestination {
    /// How many images have something that is not durable.
    #[cfg(test)]
    pub(super) fn not_durable(&self) -> usize {
        self.images.iter().filter(|image| image.is_written()).count()
    }

    fn files(&self) -> MutexGuard<'_, Vec<Temporary>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileBuilder {
    /// Removes temporary files that a killed destination for the same files left behind.
    pub(super) fn new(settings: FileGuestSettings) -> Result<Self, GuestError> {
        settings.validate()?;
        let targets = settings.images.iter().chain(&settings.state_files).filter_map(|file| target_of(&file.path).ok());
        targets.for_each(|target| remove_abandoned(&target));
        Ok(Self { settings })
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

    /// Every file has a distinct place, which is available.
    fn check_targets(&self) -> Result<(), GuestError> {
        let mut taken = HashSet::new();
        for Image { path, .. } in self.settings.images.iter().chain(&self.settings.state_files) {
            let target = self.check_target(path)?;
            if !taken.insert(target) {
                return Err(GuestError(format!(
                    "{} leads to the place of another file",
                    Untrusted::from(path.as_path())
                )));
            }
        }
        Ok(())
    }

    /// The target that a path resolves to.
    fn check_target(&self, path: &Path) -> Result<PathBuf, GuestError> {
        match path.metadata() {
            Ok(found) if found.is_dir() => Err(GuestError(format!("{} is a folder", Untrusted::from(path)))),
            Ok(found) if !found.is_file() => {
                Err(GuestError(format!("{} is no regular file, and stays: name another", Untrusted::from(path))))
            }
            Ok(_) if !self.settings.overwrite => {
                Err(GuestError(format!("{} exists: remove it, or set overwrite = true", Untrusted::from(path))))
            }
            _ => target_of(path).map_err(|error| GuestError::caused(Untrusted::from(path), error)),
        }
    }
}

/// An image that will replace `target`, sparse at first.
fn image(target: &Path, length: u64) -> Result<(Temporary, Arc<FileMemory>), GuestError> {
    let (file, temporary) = create(target)?;
    let memory = FileMemory::over(file, temporary.path(), length).map_err(|error| GuestError(error.to_string()))?;
    Ok((temporary, Arc::new(memory)))
}

/// On disk when this returns.
fn state_file(target: &Path, bytes: &[u8]) -> Result<Temporary, GuestError> {
    let (mut file, temporary) = create(target)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(|error| {
        GuestError::caused(format_args!("{}: cannot be written", Untrusted::from(temporary.path())), error)
    })?;
    Ok(temporary)
}

fn create(target: &Path) -> Result<(File, Temporary), GuestError> {
    Temporary::create(target).map_err(|error| GuestError::caused(Untrusted::from(target), error))
}

/// Places all files. If none may be replaced and a place is taken, it places none. A replaced file cannot be restored.
fn place(files: &[Temporary], overwrite: bool) -> Result<(), GuestError> {
    for (index, file) in files.iter().enumerate() {
        let Err(error) = (if overwrite { file.replace() } else { file.place() }) else { continue };
        let failed = format!("{} cannot take its place: {error}", Untrusted::from(file.target()));
        let stays = |file: &&Temporary| overwrite || file.displace().is_err();
        let in_place: Vec<_> = files[..index].iter().filter(stays).map(Temporary::target).collect();
        return Err(GuestError(if in_place.is_empty() {
            failed
        } else {
            format!("{failed}; in place are {in_place:?}")
        }));
    }
    let folders: BTreeSet<_> = files.iter().map(|file| folder(file.target())).collect();
    folders.into_iter().try_for_each(|folder| {
        let synced = File::open(folder).and_then(|open| open.sync_all());
        synced.map_err(|error| {
            GuestError::caused(format_args!("the images are in place, but {}", Untrusted::from(folder)), error)
        })
    })
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
