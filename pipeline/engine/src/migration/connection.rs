//! The two directions of a connection, as both ends use them.

use memferry_stages::silence::Attentive;
use memferry_stages::wire::reader::FrameReader;
use tokio::io::{AsyncRead, AsyncWrite};

pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;
pub(super) type Reader = FrameReader<Attentive<Box<dyn AsyncRead + Send + Unpin>>>;
