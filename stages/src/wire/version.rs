//! What a stream is known by: the same in every version of the protocol.

/// First bytes of every stream's Hello body: what `file` and a port's listener recognise it by.
pub(super) const MAGIC: [u8; 8] = *b"memferry";

/// The version of the stream's format. A peer of another version is refused with both versions named.
pub const PROTOCOL_VERSION: u16 = 4;
