//! Memory for decoded images: large ones get pages of their own.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::MmapMut;

/// Buffers of this many bytes and more have pages of their own.
const LARGE: usize = 128 * 1024;

/// The mappings of this process.
///
/// A static, since the limit belongs to the process: Linux allows 65,530 mappings, of which half are left to others.
/// Two servers in one process share it, and all that they can notice of each other is where a buffer lies.
static MAPPINGS: Mappings = Mappings { count: AtomicUsize::new(0), limit: 32 * 1024 };

/// Counts the buffers that have pages of their own.
struct Mappings {
    count: AtomicUsize,
    limit: usize,
}

/// The bytes of a decoded image.
///
/// Images come and go in all sizes, which leaves holes in an allocator's heaps: a fifth to a third of the budget. A
/// large buffer therefore has pages of its own, which go back to the system with it.
pub struct Buffer {
    memory: Memory,
    length: usize,
}

enum Memory {
    Heap(Vec<u8>),
    Pages(Pages),
}

/// A mapping that is counted until it is dropped.
struct Pages {
    map: MmapMut,
    counted_by: &'static Mappings,
}

impl Mappings {
    /// Maps pages; `None` at the limit, or if the system refuses.
    fn map(&'static self, length: usize) -> Option<Pages> {
        if self.count.fetch_add(1, Ordering::Relaxed) < self.limit
            && let Ok(map) = MmapMut::map_anon(length)
        {
            return Some(Pages { map, counted_by: self });
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.counted_by.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Buffer {
    /// A buffer of zeros, to be written over.
    #[must_use]
    pub fn zeroed(length: usize) -> Buffer {
        Buffer::zeroed_within(&MAPPINGS, length)
    }

    fn zeroed_within(mappings: &'static Mappings, length: usize) -> Buffer {
        let pages = if length < LARGE { None } else { mappings.map(length) };
        let memory = pages.map_or_else(|| Memory::Heap(vec![0; length]), Memory::Pages);
        Buffer { memory, length }
    }

    /// Shortens the buffer to a length, unless it is as short already.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => &pages.map,
        };
        &all[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => &mut pages.map,
        };
        &mut all[..self.length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_its_bytes_on_the_heap_and_in_pages() {
        for length in [0, 1, LARGE - 1, LARGE, LARGE + 1] {
            let bytes: Vec<u8> = (0..length).map(|it| u8::try_from(it % 251).unwrap()).collect();
            let mut buffer = Buffer::zeroed(length);
            assert!(buffer.len() == length && buffer.iter().all(|it| *it == 0));
            assert_eq!(matches!(buffer.memory, Memory::Pages(_)), length >= LARGE);
            buffer.copy_from_slice(&bytes);
            assert_eq!(buffer[..], bytes);
            buffer.truncate(length / 2);
            buffer.truncate(length);
            assert_eq!(buffer[..], bytes[..length / 2]);
        }
    }

    #[test]
    fn there_are_no_more_mappings_than_the_limit() {
        static THREE: Mappings = Mappings { count: AtomicUsize::new(0), limit: 3 };
        for _ in 0..2 {
            let buffers: Vec<_> = (0..5).map(|_| Buffer::zeroed_within(&THREE, LARGE)).collect();
            let mapped = buffers.iter().filter(|it| matches!(it.memory, Memory::Pages(_)));
            assert_eq!(mapped.count(), 3);
            assert!(buffers.iter().all(|it| it.len() == LARGE));
        }
        assert_eq!(THREE.count.load(Ordering::Relaxed), 0);
    }
}
