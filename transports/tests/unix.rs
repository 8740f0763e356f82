//! The socket's file: who may use it, who owns it, and what stays untouched.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use memferry_transports::Transport;
use memferry_transports::unix::UnixTransport;

fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("memferry.sock");
    (directory, path)
}

fn transport(path: &Path) -> UnixTransport {
    UnixTransport::new(path, Duration::from_millis(200))
}

#[tokio::test]
async fn the_socket_is_the_owners_from_its_first_moment() {
    let (_directory, path) = place();
    let (stop, watched) = (Arc::new(AtomicBool::new(false)), path.clone());
    let seen = Arc::new(AtomicU32::new(0));
    let watcher = std::thread::spawn({
        let (stop, seen) = (stop.clone(), seen.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                if let Ok(found) = fs::symlink_metadata(&watched) {
                    assert_eq!(found.permissions().mode() & 0o7777, 0o600);
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    // A watcher that never sees the socket has tested nothing.
    let begun = Instant::now();
    while seen.load(Ordering::Relaxed) < 100 && !watcher.is_finished() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the socket was seen {seen:?} times");
        let listener = transport(&path).listen().await.expect("listening");
        assert_eq!(fs::metadata(&path).expect("the socket").permissions().mode() & 0o7777, 0o600);
        drop(listener);
        assert!(!path.exists(), "removed when it is no longer listened to");
    }
    stop.store(true, Ordering::Relaxed);
    watcher.join().expect("never another mode");
}

#[tokio::test]
async fn a_stale_socket_is_replaced() {
    let (_directory, path) = place();
    drop(UnixListener::bind(&path).expect("bound"));
    assert!(path.exists(), "std leaves its file");
    let before = fs::metadata(&path).expect("stale").ino();
    let mut listener = transport(&path).listen().await.expect("replaced");
    let transport = transport(&path);
    let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
    let (_source, destination) = (source.expect("connected"), destination.expect("accepted"));
    assert_eq!(destination.peer, format!("process {}", std::process::id()));
    assert_eq!(listener.local_address(), format!("unix:{}", path.display()));
    println!("inode {before} gave way to {}", fs::metadata(&path).expect("ours").ino());
}

#[tokio::test]
async fn a_live_socket_is_an_error_and_stays() {
    let (_directory, path) = place();
    let live = UnixListener::bind(&path).expect("bound");
    let error = transport(&path).listen().await.expect_err("in use");
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    let message = error.to_string();
    assert!(message.contains("already listening") && message.contains(path.to_str().expect("a path")), "{message}");
    UnixStream::connect(&path).expect("still there");
    drop(live);
}

#[tokio::test]
async fn a_live_socket_with_a_full_backlog_is_live() {
    let (_directory, path) = place();
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&socket2::SockAddr::unix(&path).expect("an address")).expect("bound");
    socket.listen(0).expect("listening");
    let _waiting = UnixStream::connect(&path).expect("the only place");
    let error = transport(&path).listen().await.expect_err("in use");
    assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
    assert!(path.exists());
    let error = transport(&path).connect().await.expect_err("no place");
    assert!(error.to_string().contains("tried for"), "{error}");
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let (directory, path) = place();
    fs::write(&path, b"precious").expect("written");
    let error = transport(&path).listen().await.expect_err("a file");
    assert!(error.to_string().contains("is no socket"), "{error}");
    assert_eq!(fs::read(&path).expect("still there"), b"precious");

    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("linked");
    transport(&link).listen().await.expect_err("a link");
    assert!(link.is_symlink());

    transport(directory.path()).listen().await.expect_err("a directory");
    assert!(directory.path().is_dir());
}

#[tokio::test]
async fn a_socket_of_another_program_is_not_removed() {
    let (_directory, path) = place();
    let listener = transport(&path).listen().await.expect("listening");
    fs::remove_file(&path).expect("removed behind its back");
    let other = UnixListener::bind(&path).expect("bound by another");
    drop(listener);
    UnixStream::connect(&path).expect("the other's is there");
    drop(other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_that_find_a_stale_socket_one_listens() {
    for _ in 0..40 {
        let (_directory, path) = place();
        drop(UnixListener::bind(&path).expect("bound"));
        let tries = (0..6).map(|_| {
            let transport = transport(&path);
            tokio::spawn(async move { transport.listen().await })
        });
        let listeners = futures::future::join_all(tries).await;
        let listeners: Vec<_> = listeners.into_iter().filter_map(|listener| listener.expect("no panic").ok()).collect();
        assert_eq!(listeners.len(), 1);
        UnixStream::connect(&path).expect("the one that listens is at the path");
    }
}

#[tokio::test]
async fn a_locked_directory_only_delays() {
    let (directory, path) = place();
    let lock = fs::File::open(directory.path()).expect("opened");
    lock.lock().expect("locked");
    let begun = Instant::now();
    transport(&path).listen().await.expect("listening");
    assert!(begun.elapsed() > Duration::from_millis(900));
}

#[tokio::test]
async fn a_path_that_is_too_long_is_refused() {
    let path = PathBuf::from(format!("/tmp/{}", "p".repeat(103)));
    for error in [
        transport(&path).connect().await.expect_err("too long"),
        transport(&path).listen().await.expect_err("too long"),
    ] {
        assert!(error.to_string().contains("108 bytes, a socket's has at most 107"), "{error}");
    }
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let error = transport(Path::new("/no/such/place")).listen().await.expect_err("no directory");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("unix:/no/such/place"), "{error}");
}
