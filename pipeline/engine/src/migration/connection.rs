//! The two directions of a connection, as both ends use them.

use memferry_stages::silence::Attentive;
use memferry_stages::wire::WireDeframer;
use memferry_stages::wire::reader::FrameReader;
use tokio::io::{AsyncRead, AsyncWrite};

pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;
type Bytes = Attentive<Box<dyn AsyncRead + Send + Unpin>>;
pub(super) type Reader = FrameReader<Bytes>;
pub(super) type Deframer = WireDeframer<Bytes>;
