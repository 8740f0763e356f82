//! A file is complete or absent, and only its owner's.

#[path = "../../tests/src/skip.rs"]
pub mod skip;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use futures::FutureExt;
use memferry_transports::file::FileTransport;
use memferry_transports::{Connection, Transport};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use skip::skipped;

type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// How long anything may take on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("stream");
    (directory, path)
}

async fn writer(path: &Path) -> Writer {
    let Connection { writer, reader, .. } = FileTransport::new(path).connect().await.expect("created");
    assert!(reader.is_none());
    writer.expect("a writer")
}

async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut listener = FileTransport::new(path).listen().await?;
    let Connection { writer, reader, .. } = listener.accept_ready().await?;
    assert!(writer.is_none());
    let mut bytes = Vec::new();
    reader.expect("a reader").read_to_end(&mut bytes).await?;
    Ok(bytes)
}

fn names_in(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).expect("a directory");
    names.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
}

async fn a_whole_stream() {
    let (directory, path) = place();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 253) as u8).collect();
    let mut writer = writer(&path).await;
    for (number, part) in bytes.chunks(700_000).enumerate() {
        writer.write_all(part).await.expect("written");
        if number == 2 {
            writer.flush().await.expect("flushed");
        }
        let names = names_in(directory.path());
        assert!(names.len() == 1 && names[0].starts_with("stream.memferry-"), "{names:?}");
        let temporary = fs::metadata(directory.path().join(&names[0])).expect("the temporary file");
        assert_eq!(temporary.permissions().mode() & 0o7777, 0o600);
    }
    writer.shutdown().await.expect("complete");
    writer.shutdown().await.expect("still complete");
    writer.flush().await.expect("nothing to flush");
    writer.write_all(b"more").await.expect_err("the stream has ended");
    drop(writer);
    assert_eq!(names_in(directory.path()), ["stream"]);
    assert_eq!(fs::metadata(&path).expect("the stream").permissions().mode() & 0o7777, 0o600);
    assert!(read(&path).await.expect("read back") == bytes);
    assert!(read(&path).await.expect("read again") == bytes);
}

#[tokio::test]
async fn a_stream_is_absent_until_it_is_complete() {
    a_whole_stream().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_absent_until_it_is_complete_with_several_threads() {
    tokio::spawn(a_whole_stream()).await.expect("no panic");
}

#[tokio::test]
async fn a_dropped_writer_leaves_nothing() {
    let (directory, path) = place();
    for flushed in [false, true] {
        let mut writer = writer(&path).await;
        writer.write_all(b"half").await.expect("written");
        if flushed {
            writer.flush().await.expect("flushed");
        }
        drop(writer);
        assert!(names_in(directory.path()).is_empty());
    }
}

#[tokio::test]
async fn what_stood_there_stays_until_something_complete_replaces_it() {
    let (directory, path) = place();
    fs::write(&path, b"old").expect("written");
    let mut broken = writer(&path).await;
    broken.write_all(b"half").await.expect("written");
    broken.flush().await.expect("flushed");
    assert_eq!(fs::read(&path).expect("old"), b"old");
    drop(broken);
    assert_eq!(fs::read(&path).expect("old"), b"old");

    let mut whole = writer(&path).await;
    whole.write_all(b"whole").await.expect("written");
    whole.shutdown().await.expect("complete");
    assert_eq!(fs::read(&path).expect("whole"), b"whole");
    assert_eq!(names_in(directory.path()), ["stream"]);
}

#[tokio::test]
async fn a_shutdown_given_up_halfway_is_whole_or_nothing() {
    for polls in 0..40 {
        let (directory, path) = place();
        let mut writer = writer(&path).await;
        writer.write_all(&[7; 100_000]).await.expect("written");
        for _ in 0..polls {
            if writer.shutdown().now_or_never().is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_micros(50)).await;
        }
        drop(writer);
        // The operation in the background renames or removes the partial file in the end.
        let begun = Instant::now();
        let names = loop {
            let names = names_in(directory.path());
            if !names.iter().any(|name| name.starts_with("stream.partial-")) {
                break names;
            }
            assert!(begun.elapsed() < PATIENCE, "{names:?} stays");
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        match names[..] {
            [] => {}
            [ref name] => assert_eq!((name.as_str(), fs::read(&path).expect("whole").len()), ("stream", 100_000)),
            ref more => panic!("{more:?}"),
        }
    }
}

#[tokio::test]
async fn a_symbolic_link_is_followed() {
    let (directory, path) = place();
    fs::write(&path, b"old").expect("written");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("linked");
    let mut writer = writer(&link).await;
    writer.write_all(b"by link").await.expect("written");
    writer.shutdown().await.expect("complete");
    assert!(link.is_symlink());
    assert_eq!(fs::read(&path).expect("the target"), b"by link");
}

#[tokio::test]
async fn only_a_regular_file_is_replaced_or_read() {
    let directory = tempfile::tempdir().expect("a directory");
    for (path, words) in [(directory.path(), "is a directory"), (Path::new("/dev/null"), "no regular file")] {
        for error in
            [FileTransport::new(path).connect().await.expect_err("refused"), read(path).await.expect_err("refused")]
        {
            assert!(error.to_string().contains(words) && error.to_string().contains("file:/"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_missing_file_is_an_error_at_once_and_may_come_later() {
    let (_directory, path) = place();
    let mut listener = FileTransport::new(&path).listen().await.expect("at once");
    let error = listener.accept_ready().await.expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains(path.to_str().expect("a path")), "{error}");
    fs::write(&path, b"here").expect("written");
    listener.accept_ready().await.expect("there");
    assert!(listener.accept_ready().now_or_never().is_none(), "a file is one connection");
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let error = FileTransport::new("/no/such/stream").connect().await.expect_err("no directory");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("file:/no/such/stream"), "{error}");
}

/// A small file system that goes with this value.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Result<Self, String> {
        let directory = tempfile::tempdir().expect("a directory");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(directory.path()).output();
        match mount {
            Ok(output) if output.status.success() => Ok(Self(directory)),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{} is still mounted", self.0.path().display());
    }
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_leaves_what_was_there() {
    let small = match Small::mount() {
        Ok(small) => small,
        Err(why) => {
            skipped(format_args!("no small file system can be mounted ({})", why.trim()));
            return;
        }
    };
    let path = small.0.path().join("stream");
    fs::write(&path, b"old").expect("written");
    let mut writer = writer(&path).await;
    let error = writer.write_all(&vec![1; 2 << 20]).await.expect_err("full");
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    assert!(error.to_string().contains("stream.memferry-"), "{error}");
    let error = writer.shutdown().await.expect_err("it failed before");
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    drop(writer);
    assert_eq!(names_in(small.0.path()), ["stream"]);
    assert_eq!(fs::read(&path).expect("old"), b"old");
}
