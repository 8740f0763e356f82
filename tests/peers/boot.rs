//! A boot sector that writes memory: one byte in each page of a range, page after page, at a set pace, endlessly.
//!
//! It works like the one of QEMU's own migration tests, with a pace in addition. The processor switches to 32-bit
//! mode, where all memory is one flat segment, and counts the ticks of the interval timer (the PIT, 1,193,182 per
//! second), which stops while the machine is paused. Ticks are credit, and each page costs some of it. A delay is
//! caught up later, so the pace is constant on average.

use serde::{Deserialize, Serialize};

/// The pages to write, and the pace.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Pace {
    /// The number of pages of the machine.
    pub(crate) memory_pages: u32,
    /// The first page that is written.
    pub(crate) first_page: u32,
    /// The number of pages that are written, in turn.
    pub(crate) pages: u32,
    /// Pages per second.
    pub(crate) pages_per_second: u32,
}

/// The address at which the sector counts the pages that it has written, in 32 bits.
pub(crate) const COUNTER: u32 = 0x600;

/// Bytes of a floppy disk, whose first sector this is.
pub(crate) const FLOPPY_BYTES: usize = 1440 << 10;

/// The address to which a BIOS loads a boot sector.
const ORIGIN: u32 = 0x7c00;
const SECTOR: usize = 512;
const PIT_TICKS_PER_SECOND: u64 = 1_193_182;
/// The credit for a tick, as a power of two, so that fractions of a tick count.
const TICK_SHIFT: u8 = 10;
/// Iterations of an empty loop between two reads of the timer.
const REST: u32 = 4096;

/// Offset in the sector of the descriptors of the flat segments.
const GDT: usize = 0x180;
const CODE_SEGMENT: u8 = 0x08;
const DATA_SEGMENT: u8 = 0x10;

/// The sector.
pub(crate) fn sector(pace: &Pace) -> Vec<u8> {
    let entry = to_32_bit(0).len();
    let mut sector = to_32_bit(entry);
    sector.extend(write_for_ever(pace));
    assert!(sector.len() <= GDT, "the code reaches into the descriptors");
    sector.resize(GDT, 0);
    sector.extend(descriptors());
    sector.resize(SECTOR - 2, 0);
    sector.extend([0x55, 0xaa]); // what makes it a boot sector
    sector
}

/// The switch from real mode to 32-bit mode; the code is at this offset.
fn to_32_bit(entry: usize) -> Vec<u8> {
    let table = low_half(ORIGIN) + u16::try_from(GDT + 24).expect("in the sector");
    let entry = low_half(ORIGIN) + u16::try_from(entry).expect("in the sector");
    [
        &[0xfa][..],          // cli
        &[0x31, 0xc0],        // xor  ax, ax
        &[0x8e, 0xd8],        // mov  ds, ax
        &[0xe4, 0x92],        // in   al, 0x92        the line A20 on, if it is not
        &[0x0c, 0x02],        // or   al, 2
        &[0xe6, 0x92],        // out  0x92, al
        &[0x0f, 0x01, 0x16],  // lgdt [table]
        &table.to_le_bytes(), //
        &[0x0f, 0x20, 0xc0],  // mov  eax, cr0
        &[0x0c, 0x01],        // or   al, 1           protected mode
        &[0x0f, 0x22, 0xc0],  // mov  cr0, eax
        &[0xea],              // jmp  CODE_SEGMENT:entry
        &entry.to_le_bytes(), //
        &[CODE_SEGMENT, 0],   //
    ]
    .concat()
}

/// The code in 32-bit mode. edi: the page; ebx: the timer's last count; ebp: credit.
fn write_for_ever(pace: &Pace) -> Vec<u8> {
    let first = pace.first_page * 4096;
    let end = first + pace.pages * 4096;
    let cost = (PIT_TICKS_PER_SECOND << TICK_SHIFT) / u64::from(pace.pages_per_second);
    let cost = u32::try_from(cost).expect("not below one page a second");
    let begin = [
        &[0x66, 0xb8, DATA_SEGMENT, 0][..], // mov  ax, DATA_SEGMENT
        &[0x8e, 0xd8],                      // mov  ds, ax
        &[0xb0, 0x34],                      // mov  al, 0x34       timer 0: low and high byte, down and around
        &[0xe6, 0x43],                      // out  0x43, al
        &[0x31, 0xc0],                      // xor  eax, eax       from 65536
        &[0xe6, 0x40],                      // out  0x40, al
        &[0xe6, 0x40],                      // out  0x40, al
        &[0x31, 0xdb],                      // xor  ebx, ebx
        &[0x31, 0xed],                      // xor  ebp, ebp
        &[0xbf],                            // mov  edi, first
        &first.to_le_bytes(),               //
    ]
    .concat();
    let look = [
        &[0x31, 0xc0][..],         // look: xor  eax, eax
        &[0xe6, 0x43],             // out  0x43, al       holds timer 0's count for the next two reads
        &[0xe4, 0x40],             // in   al, 0x40
        &[0x88, 0xc1],             // mov  cl, al
        &[0xe4, 0x40],             // in   al, 0x40
        &[0x88, 0xc5],             // mov  ch, al
        &[0x89, 0xd8],             // mov  eax, ebx       ticks since the last look = last count - count,
        &[0x29, 0xc8],             // sub  eax, ecx       in 16 bits
        &[0x0f, 0xb7, 0xc0],       // movzx eax, ax
        &[0x89, 0xcb],             // mov  ebx, ecx
        &[0xc1, 0xe0, TICK_SHIFT], // shl  eax, TICK_SHIFT
        &[0x01, 0xc5],             // add  ebp, eax
    ]
    .concat();
    let wrap = [
        &[0xbf][..],          // mov  edi, first
        &first.to_le_bytes(), //
    ]
    .concat();
    let write = [
        &[0x29, 0xcd][..],               // sub  ebp, ecx
        &[0xfe, 0x07],                   // inc  byte [edi]
        &[0xff, 0x05],                   // inc  dword [COUNTER]
        &COUNTER.to_le_bytes(),          //
        &[0x81, 0xc7, 0x00, 0x10, 0, 0], // add  edi, 4096
        &[0x81, 0xff],                   // cmp  edi, end
        &end.to_le_bytes(),              //
        &[0x72, short(wrap.len())],      // jb   spend
        &wrap,                           //
    ]
    .concat();
    let pay = [
        &[0xb9][..],         // mov  ecx, cost
        &cost.to_le_bytes(), //
    ]
    .concat();
    let test = [
        &[0x39, 0xcd][..],               // spend: cmp  ebp, ecx
        &[0x72, short(write.len() + 2)], // jb   rest
    ]
    .concat();
    let again = [0xeb, back(test.len() + write.len() + 2)]; // jmp  spend
    let rest = [
        &[0xb9][..],         // rest: mov  ecx, REST
        &REST.to_le_bytes(), //
        &[0x49],             // dec  ecx
        &[0x75, back(3)],    // jnz  to dec
    ]
    .concat();
    let turn = look.len() + pay.len() + test.len() + write.len() + again.len() + rest.len();
    let round = [0xeb, back(turn + 2)]; // jmp  look
    [&begin[..], &look, &pay, &test, &write, &again, &rest, &round].concat()
}

/// Three descriptors, followed by the operand of `lgdt`.
fn descriptors() -> Vec<u8> {
    let flat = |access: u8| [0xff, 0xff, 0, 0, 0, access, 0xcf, 0]; // from 0 to 4 GiB, 32 bits
    let address = ORIGIN + u32::try_from(GDT).expect("in the sector");
    [&[0; 8][..], &flat(0x9a), &flat(0x92), &23_u16.to_le_bytes(), &address.to_le_bytes()].concat()
}

/// The displacement of a short jump forward over this many bytes.
fn short(bytes: usize) -> u8 {
    u8::try_from(bytes).ok().filter(|&bytes| bytes < 128).expect("a short jump")
}

/// The displacement of a short jump back over this many bytes, its own included.
fn back(bytes: usize) -> u8 {
    short(bytes).wrapping_neg()
}

fn low_half(address: u32) -> u16 {
    u16::try_from(address & 0xffff).expect("16 bits")
}
