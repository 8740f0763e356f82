//! The machine under a bench.

use std::io;

use memferry_stages::memory::MappedMemory;

/// Touches this many bytes of memory and frees them. The host of a virtual machine may reclaim the machine's free
/// memory, which then costs many times more to touch: without this call, the cost would fall on the first run after a
/// pause.
///
/// # Errors
/// If there is not enough memory.
pub fn warm_memory(bytes: usize) -> io::Result<()> {
    let memory = MappedMemory::anonymous(bytes)?;
    // Huge pages are an optimization: without them the result is the same.
    drop(memory.advise_huge());
    (0..memory.len()).step_by(4096).for_each(|page| memory.store(page, &[1]));
    Ok(())
}
