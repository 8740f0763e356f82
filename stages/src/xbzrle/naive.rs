//! The oracle: the encoding byte by byte, as the description reads. Tests compare the fast code with it, benches
//! measure against it.

use super::{Encoded, MAX_RUN, PIECE_BYTES};

/// A simple [`super::encode_page`].
///
/// # Panics
/// As [`super::encode_page`].
pub fn encode_page(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    super::assert_sizes(old, new, out);
    if new.len() <= MAX_RUN { encode(old, new, out) } else { encode_pieces(old, new, out) }
}

/// [`super::Delta::parse`] and [`super::Delta::apply`] in one, patching as it reads: the page is left damaged if this is not a
/// delta. Returns whether it was one.
pub fn apply(delta: &[u8], page: &mut [u8]) -> bool {
    if page.len() <= MAX_RUN { !delta.is_empty() && decode(delta, page).is_some() } else { apply_pieces(delta, page) }
}

fn encode_pieces(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    if equal(old, new) {
        return Encoded::Equal;
    }
    let mut written = 0;
    for (old, new) in old.chunks(PIECE_BYTES).zip(new.chunks(PIECE_BYTES)) {
        if written + 2 > out.len() {
            return Encoded::Overflow;
        }
        let (length, room) = out[written..].split_at_mut(2);
        let most = room.len().min(new.len());
        let bytes = match encode(old, new, &mut room[..most]) {
            Encoded::Equal => 0,
            Encoded::Delta(bytes) => bytes,
            Encoded::Overflow if new.len() + 3 <= room.len() => one_run(new, room),
            Encoded::Overflow => return Encoded::Overflow,
        };
        length.copy_from_slice(&u16::try_from(bytes).expect("little more than a piece").to_le_bytes());
        written += 2 + bytes;
    }
    Encoded::Delta(written)
}

fn one_run(new: &[u8], room: &mut [u8]) -> usize {
    let mut written = put_uleb(0, room);
    written += put_uleb(new.len(), &mut room[written..]);
    room[written..][..new.len()].copy_from_slice(new);
    written + new.len()
}

fn encode(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    if equal(old, new) {
        return Encoded::Equal;
    }
    let (mut at, mut written) = (0, 0);
    while at < new.len() {
        if written + 2 > out.len() {
            return Encoded::Overflow;
        }
        let zrun = (at..new.len()).take_while(|&i| old[i] == new[i]).count();
        at += zrun;
        if at == new.len() {
            break;
        }
        written += put_uleb(zrun, &mut out[written..]);
        if written + 2 > out.len() {
            return Encoded::Overflow;
        }
        let nzrun = (at..new.len()).take_while(|&i| old[i] != new[i]).count();
        written += put_uleb(nzrun, &mut out[written..]);
        if written + nzrun > out.len() {
            return Encoded::Overflow;
        }
        out[written..][..nzrun].copy_from_slice(&new[at..][..nzrun]);
        written += nzrun;
        at += nzrun;
    }
    Encoded::Delta(written)
}

fn equal(old: &[u8], new: &[u8]) -> bool {
    (0..new.len()).all(|i| old[i] == new[i])
}

fn apply_pieces(delta: &[u8], page: &mut [u8]) -> bool {
    let (mut rest, mut changed) = (delta, false);
    for piece in page.chunks_mut(PIECE_BYTES) {
        let Some((length, tail)) = rest.split_first_chunk() else { return false };
        let Some((delta, tail)) = tail.split_at_checked(usize::from(u16::from_le_bytes(*length))) else { return false };
        if decode(delta, piece).is_none() {
            return false;
        }
        changed |= !delta.is_empty();
        rest = tail;
    }
    changed && rest.is_empty()
}

/// The number of bytes up to which the page was patched.
fn decode(delta: &[u8], page: &mut [u8]) -> Option<usize> {
    let (mut read, mut at) = (0, 0);
    while read < delta.len() {
        let (zrun, bytes) = get_uleb(&delta[read..])?;
        if zrun == 0 && read > 0 {
            return None;
        }
        read += bytes;
        at += zrun;
        if at > page.len() {
            return None;
        }
        let (nzrun, bytes) = get_uleb(&delta[read..])?;
        read += bytes;
        if nzrun == 0 || at + nzrun > page.len() || read + nzrun > delta.len() {
            return None;
        }
        page[at..][..nzrun].copy_from_slice(&delta[read..][..nzrun]);
        at += nzrun;
        read += nzrun;
    }
    Some(at)
}

/// Writes a run length and returns its bytes.
pub(super) fn put_uleb(length: usize, out: &mut [u8]) -> usize {
    assert!(length <= MAX_RUN, "a run of {length}");
    let [low, high] = [length & 0x7f, length >> 7].map(|bits| u8::try_from(bits).expect("7 bits"));
    if high == 0 {
        out[0] = low;
        return 1;
    }
    out[..2].copy_from_slice(&[low | 0x80, high]);
    2
}

/// A run length and its bytes, if it is one and at least two bytes are left.
pub(super) fn get_uleb(bytes: &[u8]) -> Option<(usize, usize)> {
    match *bytes {
        [] | [_] => None,
        [low, ..] if low < 0x80 => Some((usize::from(low), 1)),
        [low, high, ..] if high < 0x80 => Some((usize::from(low & 0x7f) | usize::from(high) << 7, 2)),
        _ => None,
    }
}
