//! Pages to measure on: contents of memory, and changes to it.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use fastrand::Rng;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};

use super::PAGE;

/// A number of bytes of one kind.
pub(crate) type Content = fn(usize) -> Vec<u8>;

/// What pages hold. A page that was never written is an input of its own: [`untouched`].
pub(crate) const CONTENTS: [(&str, Content); 4] =
    [("zero", zeros), ("text", text), ("process", process), ("random", random)];

/// Zeros that were written: memory that is only allocated is the kernel's one zero page, again and again.
pub(crate) fn zeros(bytes: usize) -> Vec<u8> {
    let mut zeros = vec![1; bytes];
    black_box(&mut zeros).fill(0);
    black_box(zeros)
}

/// Bytes without a pattern.
pub(crate) fn random(bytes: usize) -> Vec<u8> {
    let mut random = Rng::with_seed(1);
    let mut content = vec![0; bytes];
    random.fill(&mut content);
    black_box(content)
}

/// Words in lines, chosen by chance.
pub(crate) fn text(bytes: usize) -> Vec<u8> {
    let words = ["memory ", "page ", "of ", "the ", "guest ", "dirty ", "round ", "lane ", "\n"];
    let mut random = Rng::with_seed(3);
    let megabyte = std::iter::repeat_with(|| words[random.usize(..words.len())].bytes()).flatten().take(1 << 20);
    repeated(&megabyte.collect::<Vec<_>>(), bytes)
}

/// The memory of this process at the first call: its program and libraries, its heap and stack.
pub(crate) fn process(bytes: usize) -> Vec<u8> {
    static MEMORY: OnceLock<Vec<u8>> = OnceLock::new();
    repeated(MEMORY.get_or_init(own_memory), bytes)
}

fn own_memory() -> Vec<u8> {
    const MOST: usize = 16 << 20;
    let maps = std::fs::read_to_string("/proc/self/maps").expect("a process can read its own map");
    let memory = File::open("/proc/self/mem").expect("a process can read its own memory");
    let mut pages = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" r")) {
        let (start, rest) = line.split_once('-').expect("a range");
        let (end, _) = rest.split_once(' ').expect("a range");
        let [start, end] = [start, end].map(|at| u64::from_str_radix(at, 16).expect("an address"));
        let mut page = [0; PAGE];
        let readable = (start..end).step_by(PAGE).take_while(|_| pages.len() < MOST);
        for at in readable.collect::<Vec<_>>() {
            if memory.read_exact_at(&mut page, at).is_ok() && page != [0; PAGE] {
                pages.extend(page);
            }
        }
    }
    assert!(!pages.is_empty(), "a process has memory");
    pages.truncate(MOST);
    pages
}

fn repeated(content: &[u8], bytes: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes);
    while all.len() < bytes {
        all.extend_from_slice(&content[..content.len().min(bytes - all.len())]);
    }
    black_box(all)
}

type Change = fn(&mut [u8], &mut Rng);

/// What changes in every page.
pub(crate) const CHANGES: [(&str, Change); 8] = [
    ("equal", |_, _| {}),
    ("1 byte", |page, random| flip(&mut page[random.usize(..PAGE)..][..1])),
    ("1 word", |page, random| flip(&mut page[random.usize(..PAGE / 8) * 8..][..8])),
    ("8 words", |page, random| (0..8).for_each(|_| flip(&mut page[random.usize(..PAGE / 8) * 8..][..8]))),
    ("every 8th byte", |page, _| page.iter_mut().step_by(8).for_each(|byte| *byte ^= 1)),
    ("every 2nd byte", |page, _| page.iter_mut().step_by(2).for_each(|byte| *byte ^= 1)),
    ("half a page", |page, _| flip(&mut page[PAGE / 2..])),
    ("everything", |page, _| flip(page)),
];

fn flip(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte ^= 0x5a);
}

/// Makes the new pages of the old ones.
pub(crate) fn change(old: &[u8], new: &mut [u8], change: Change) {
    let mut random = Rng::with_seed(2);
    new.copy_from_slice(old);
    black_box(new).chunks_exact_mut(PAGE).for_each(|page| change(page, &mut random));
}

/// Memory of a guest that holds these bytes.
pub(crate) fn mapped(bytes: &[u8]) -> Arc<MappedMemory> {
    let memory = untouched(bytes.len());
    memory.store(0, bytes);
    memory
}

/// Memory that was never written.
pub(crate) fn untouched(bytes: usize) -> Arc<MappedMemory> {
    Arc::new(MappedMemory::anonymous(bytes).expect("memory"))
}

/// The pages of a memory, for controls: how fast memory is depends on where its pages happen to lie.
pub(crate) fn pages(memory: &MappedMemory) -> &[u8] {
    // SAFETY: the bytes are mapped as long as the memory is borrowed, and no bench writes them meanwhile.
    unsafe { std::slice::from_raw_parts(memory.as_ptr(), memory.len()) }
}

/// A guest of one block of such memory.
pub(crate) fn guest(memory: Arc<MappedMemory>) -> GuestMemory {
    let info = BlockInfo::new("ram", memory.len() as u64);
    GuestMemory::new(PageSize::DEFAULT, vec![RamBlock { info, memory, fresh: true }]).expect("one block")
}
