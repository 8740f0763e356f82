//! A file that is written beside its place, and moved there when it is complete.
//!
//! Takes a path and gives an open file with another name in the same directory, for the owner only. Owns that name: either
//! the file is moved to its place, or [`give_up`](Temporary::give_up) or the drop removes it; whichever comes first, and never
//! both.
//!
//! The file is locked while its owner lives. A program that is killed leaves its file behind, unlocked: the next one that writes
//! to the same place removes it, and says so. Where the file system has no locks, it stays.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::regular;
use crate::retry::in_context;

/// The text between the name of a file and the digits of its temporary name.
const MARK: &str = ".memferry-";
const DIGITS: usize = 16;
const ENDING: &str = ".partial";

/// Is there something at `path` that a file moved there would replace, and that is no plain file: a link, a device, a pipe?
#[must_use]
pub fn is_no_plain_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| !found.is_file())
}

/// The temporary file beside the path that it will have.
#[derive(Debug)]
pub struct Temporary {
    path: PathBuf,
    target: PathBuf,
    /// The open file, which holds the lock: the caller may close its own handle.
    _lock: File,
}

impl Temporary {
    /// A temporary file for what `path` shall hold, open for reading and writing. A symbolic link at `path` is followed.
    ///
    /// # Errors
    /// When there can be no such file, or what is there is no regular file.
    pub fn create(path: &Path) -> io::Result<(File, Self)> {
        let target = target_of(path)?;
        remove_abandoned(&target);
        loop {
            let path = beside(&target);
            let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(in_context(&error, &format!("cannot create {}", path.display()))),
            };
            match lock(&file, &path) {
                Ok(Some(lock)) => return Ok((file, Self { path, target, _lock: lock })),
                // Another program took it for abandoned before it was locked.
                Ok(None) => drop(fs::remove_file(&path)),
                Err(error) => {
                    drop(fs::remove_file(&path));
                    return Err(error);
                }
            }
        }
    }

    /// Where the file is until it is moved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is moved to.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Flushes the file and gives it its name. An error if it was given up, even meanwhile: either the rename or the removal
    /// finds the temporary name, never both.
    pub(crate) fn complete(&self, file: &File) -> io::Result<()> {
        file.sync_all()?;
        self.replace()?;
        // The rename is done and readers find a whole file, so this must not be reported as a failure.
        if let Err(error) = sync_directory(&self.target) {
            tracing::warn!(path = %self.target.display(), %error, "the file is in place, but a power failure may undo that");
        }
        Ok(())
    }

    /// Moves the file to its place, and replaces what is there.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn replace(&self) -> io::Result<()> {
        fs::rename(&self.path, &self.target)
    }

    /// Moves the file to its place, unless there is a file already.
    ///
    /// # Errors
    /// When there is a file, or the system refuses.
    pub fn place(&self) -> io::Result<()> {
        rename_to_nothing(&self.path, &self.target)
    }

    /// Takes the file out of its place again: dropping this removes it.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn displace(&self) -> io::Result<()> {
        rename_to_nothing(&self.target, &self.path)
    }

    /// Removes the file, unless it was moved to its place.
    pub fn give_up(&self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "the unfinished file could not be removed");
            }
            _ => {}
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Removes the temporary files that killed programs left beside `target`, and logs each of them. Files that are still written
/// stay.
pub fn remove_abandoned(target: &Path) {
    let Some(name) = target.file_name() else { return };
    let entries = fs::read_dir(directory_of(target)).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| is_beside(&entry.file_name(), name)) {
        let path = entry.path();
        // Locked until it is removed: a program that has just created it notices, and takes another name.
        let Some(_lock) = abandoned(&path) else { continue };
        match fs::remove_file(&path) {
            Ok(()) => tracing::warn!("removed {}, which a program that was killed left unfinished", path.display()),
            Err(error) => tracing::warn!(%error, "{} is unfinished and cannot be removed", path.display()),
        }
    }
}

/// A file that no other program has locked, with our lock on it.
fn abandoned(path: &Path) -> Option<File> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).expect("flags of one word");
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).ok()?;
    let is_ours = file.metadata().is_ok_and(|found| found.is_file()) && file.try_lock().is_ok();
    is_ours.then_some(file)
}

/// A second handle of the file, which is locked through either; `None` if another program has locked or removed it.
fn lock(file: &File, path: &Path) -> io::Result<Option<File>> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => tracing::debug!(path = %path.display(), %error, "no lock"),
        Ok(()) => {}
    }
    let is_there = file.metadata()?.nlink() > 0;
    if is_there { file.try_clone().map(Some) } else { Ok(None) }
}

/// Where a file for `path` goes in the end: the path, or what a symbolic link there leads to.
///
/// # Errors
/// When there is no such folder, or what is there is no regular file.
pub fn target_of(path: &Path) -> io::Result<PathBuf> {
    let missing = |what: String| Err(io::Error::new(ErrorKind::NotFound, format!("No such file or directory: {what}")));
    match fs::symlink_metadata(path) {
        Ok(found) => match fs::canonicalize(path) {
            Err(error) if error.kind() == ErrorKind::NotFound && found.is_symlink() => missing(
                "it is a symbolic link that leads to nothing: remove it, or make the file that it leads to".into(),
            ),
            target => {
                let target = target?;
                regular::require(&fs::metadata(&target)?)?;
                Ok(target)
            }
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let folder = directory_of(path);
            if folder.is_dir() {
                Ok(path.to_owned())
            } else {
                missing(format!("there is no folder {}", folder.display()))
            }
        }
        Err(error) => Err(error),
    }
}

/// A name in the same directory that nobody has.
fn beside(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(format!("{MARK}{:0DIGITS$x}{ENDING}", RandomState::new().hash_one(std::process::id())));
    name.into()
}

/// Whether `found` is a temporary name of the file `name`.
fn is_beside(found: &OsStr, name: &OsStr) -> bool {
    let rest = found.as_encoded_bytes().strip_prefix(name.as_encoded_bytes());
    let digits =
        rest.and_then(|rest| rest.strip_prefix(MARK.as_bytes())).and_then(|rest| rest.strip_suffix(ENDING.as_bytes()));
    digits.is_some_and(|digits| digits.len() == DIGITS && digits.iter().all(u8::is_ascii_hexdigit))
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_directory(of: &Path) -> io::Result<()> {
    match File::open(directory_of(of))?.sync_all() {
        // Some file systems do not support it.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        done => done,
    }
}

/// Renames, and fails if the name exists. Where the file system cannot guarantee that, the name is checked before.
fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) if to.symlink_metadata().is_err() => fs::rename(from, to),
        done => done.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a directory");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    #[test]
    fn a_stream_that_was_given_up_is_never_renamed_and_the_other_way_round() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stream");
        let (file, temporary) = Temporary::create(&path).expect("created");
        temporary.give_up();
        temporary.complete(&file).expect_err("given up");
        assert_eq!(names(directory.path()), [""; 0]);

        let (file, temporary) = Temporary::create(&path).expect("created");
        temporary.complete(&file).expect("complete");
        temporary.give_up();
        assert!(path.exists());
    }

    #[test]
    fn what_is_placed_replaces_nothing_and_what_is_displaced_is_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("image");
        let (_, first) = Temporary::create(&path).expect("created");
        let (_, second) = Temporary::create(&path).expect("created");
        first.place().expect("placed");
        second.place().expect_err("something is there");
        first.displace().expect("displaced");
        second.place().expect("placed");
        drop((first, second));
        assert_eq!(names(directory.path()), ["image"]);
    }

    #[test]
    fn what_a_dead_program_left_is_removed_and_what_a_living_one_writes_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stream");
        let abandoned = beside(&path);
        fs::write(&abandoned, "half").expect("written");
        let others = ["stream.memferry-0123.partial", "other.memferry-0123456789abcdef.partial", "stream.partial"];
        others.iter().for_each(|other| fs::write(directory.path().join(other), "").expect("written"));
        let elsewhere = directory.path().join("elsewhere");
        fs::write(&elsewhere, "").expect("written");
        let link = directory.path().join("stream.memferry-00000000000000aa.partial");
        std::os::unix::fs::symlink(&elsewhere, &link).expect("linked");

        let (file, living) = Temporary::create(&path).expect("created");
        assert!(!abandoned.exists());
        // The lock is the temporary file's own, not that of the handle it gave away.
        drop(file);
        remove_abandoned(&path);
        assert!(living.path().exists() && link.is_symlink() && elsewhere.exists());
        drop(living);
        let mut left: Vec<_> = others.into_iter().map(str::to_owned).collect();
        left.extend(["elsewhere".into(), "stream.memferry-00000000000000aa.partial".into()]);
        left.sort();
        assert_eq!(names(directory.path()), left);
    }

    #[test]
    fn a_link_is_followed_unless_it_leads_to_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let [real, link] = ["real", "link"].map(|name| directory.path().join(name));
        std::os::unix::fs::symlink(&real, &link).expect("linked");
        let error = Temporary::create(&link).expect_err("leads to nothing").to_string();
        assert!(error.contains("a symbolic link that leads to nothing"), "{error}");
        fs::write(&real, "old").expect("written");
        let (_, temporary) = Temporary::create(&link).expect("created");
        assert_eq!(temporary.target(), real.canonicalize().expect("there"));
        temporary.replace().expect("replaced");
        assert!(link.is_symlink());
        assert_eq!(fs::read(&real).expect("read"), b"");
        let error = Temporary::create(&directory.path().join("no/file")).expect_err("no folder").to_string();
        assert!(error.contains("there is no folder"), "{error}");
    }
}
