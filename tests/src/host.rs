//! The machine under a bench.

use std::io;

use memferry_stages::memory::MappedMemory;

/// Touches so many bytes of memory and gives them back. A virtual machine's free memory may be taken away by its host and
/// cost many times more when it is touched again: without this, it would cost whoever comes after a pause.
///
/// # Errors
/// If there is not so much memory.
pub fn warm_memory(bytes: usize) -> io::Result<()> {
    let memory = MappedMemory::anonymous(bytes)?;
    // Without huge pages it takes longer, and does the same.
    drop(memory.advise_huge());
    (0..memory.len()).step_by(4096).for_each(|page| memory.store(page, &[1]));
    Ok(())
}
