//! Pooled buffers: what is in flight is bounded in bytes, and no buffer is returned to the kernel (ARCHITECTURE.md,
//! law 9: memory is bounded).
//!
//! A freed buffer of 256 KiB returns to the kernel, and the next one faults in again page by page, which costs more than filling
//! it. So a pool hands out a fixed number of buffers of one size, allocates each on first use, and takes them back when they are
//! dropped. The buffer that came back last goes out first: it is the likeliest to be still in a processor's cache, and no more
//! buffers are allocated than are in use at once.
//!
//! Buffers hold pages of the guest, also when they are idle. They are left out of core dumps: each lies on whole pages of the host.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::memory::undumped::Undumped;

/// A fixed number of buffers of one size. Clones share the buffers.
#[derive(Clone, Debug)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Allocated and not in use; the last is the one that came back last.
    idle: Mutex<Vec<Undumped>>,
    /// A permit for each buffer that is not in use, allocated or not.
    free: Semaphore,
    buffer_bytes: usize,
    buffers: usize,
    made: AtomicUsize,
}

impl BufferPool {
    /// A pool of `buffers` buffers of `buffer_bytes` each. None is allocated before its first use.
    ///
    /// # Panics
    /// If `buffers` or `buffer_bytes` is 0.
    #[must_use]
    pub fn new(buffers: usize, buffer_bytes: usize) -> Self {
        assert!(buffers > 0 && buffer_bytes > 0, "a pool of {buffers} buffers of {buffer_bytes} bytes");
        let free = Semaphore::new(buffers);
        let shared = Shared { idle: Mutex::default(), free, buffer_bytes, buffers, made: AtomicUsize::new(0) };
        Self { shared: Arc::new(shared) }
    }

    /// Waits for a free buffer. Its content is unspecified.
    pub async fn take(&self) -> PooledBuffer {
        self.hand_out(self.shared.free.acquire().await.expect("it is never closed"))
    }

    /// A free buffer, if there is one now.
    #[must_use]
    pub fn try_take(&self) -> Option<PooledBuffer> {
        self.shared.free.try_acquire().ok().map(|permit| self.hand_out(permit))
    }

    /// The most bytes this pool ever holds.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        (self.shared.buffers * self.shared.buffer_bytes) as u64
    }

    /// Bytes of the buffers made so far: the peak, since none is freed before the pool is.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        (self.shared.made.load(Ordering::Relaxed) * self.shared.buffer_bytes) as u64
    }

    /// The permit comes back with the buffer.
    fn hand_out(&self, permit: SemaphorePermit<'_>) -> PooledBuffer {
        permit.forget();
        let idle = self.shared.idle().pop();
        let buffer = idle.unwrap_or_else(|| {
            self.shared.made.fetch_add(1, Ordering::Relaxed);
            Undumped::new(self.shared.buffer_bytes)
        });
        PooledBuffer { filled: 0, buffer, home: self.shared.clone() }
    }
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, Vec<Undumped>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer on loan from a [`BufferPool`]: it derefs to the part that is filled, and returns to the pool when dropped.
#[derive(Debug)]
pub struct PooledBuffer {
    filled: usize,
    buffer: Undumped,
    home: Arc<Shared>,
}

impl PooledBuffer {
    /// The whole buffer, to be written.
    pub fn space(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
    }

    /// The part that is not filled yet, to be written.
    pub fn spare(&mut self) -> &mut [u8] {
        &mut self.buffer.bytes_mut()[self.filled..]
    }

    /// Sets how many bytes from the start are filled.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub fn set_filled(&mut self, bytes: usize) {
        assert!(bytes <= self.buffer.bytes().len(), "{bytes} bytes in a buffer of {}", self.buffer.bytes().len());
        self.filled = bytes;
    }

    /// Appends bytes to the filled part.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.spare()[..bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    /// How many bytes the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.buffer.bytes().len()
    }
}

impl Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer.bytes()[..self.filled]
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.bytes_mut()[..self.filled]
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        self.home.idle().push(std::mem::take(&mut self.buffer));
        self.home.free.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_never_holds_more_than_its_bound_and_makes_buffers_on_demand() {
        let pool = BufferPool::new(2, 100);
        assert_eq!((pool.bound_bytes(), pool.peak_bytes()), (200, 0));
        let mut one = pool.try_take().unwrap();
        one.extend(b"abc");
        assert_eq!((&one[..], pool.peak_bytes()), (&b"abc"[..], 100));
        let two = pool.try_take().unwrap();
        assert!(pool.try_take().is_none());
        drop(one);
        let again = pool.try_take().unwrap();
        assert!(again.is_empty());
        assert_eq!((again.capacity(), pool.peak_bytes()), (100, 200));
        drop((two, again));
        assert_eq!(pool.peak_bytes(), 200);
    }

    #[test]
    fn the_buffer_that_came_back_last_goes_out_first() {
        let pool = BufferPool::new(3, 100);
        let [mut one, two] = [(); 2].map(|()| pool.try_take().unwrap());
        one.extend(b"one");
        drop(two);
        drop(one);
        assert_eq!(&pool.try_take().unwrap().space()[..3], b"one");
        assert_eq!(pool.peak_bytes(), 200, "none was made for want of an idle one");
    }

    #[test]
    fn a_buffer_may_outlive_its_pool() {
        let buffer = BufferPool::new(1, 8).try_take();
        drop(buffer);
    }
}
