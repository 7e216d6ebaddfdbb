//! The bytes of an image in memory.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::MmapMut;

/// Bodies from this many bytes on have pages of their own.
const LARGE: usize = 128 * 1024;

/// So many at most: Linux lets a process have 65,530 mappings, and others need some too.
const MOST: usize = 32 * 1024;

/// How many there are.
static MAPPED: AtomicUsize = AtomicUsize::new(0);

/// The bytes of an image.
///
/// Images come and go in all sizes, which leaves holes in an allocator's heaps: a fifth to a third of the budget. A large
/// body therefore has pages of its own, which go back to the system with it.
pub struct Body {
    memory: Memory,
    length: usize,
}

enum Memory {
    Heap(Vec<u8>),
    Pages(Pages),
}

/// Pages that are counted for as long as they are there.
struct Pages(MmapMut);

impl Pages {
    fn new(length: usize) -> Option<Pages> {
        if MAPPED.fetch_add(1, Ordering::Relaxed) < MOST
            && let Ok(map) = MmapMut::map_anon(length)
        {
            return Some(Pages(map));
        }
        MAPPED.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        MAPPED.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Body {
    /// Zeros, to be written over.
    #[must_use]
    pub fn zeroed(length: usize) -> Body {
        let pages = if length < LARGE { None } else { Pages::new(length) };
        let memory = pages.map_or_else(|| Memory::Heap(vec![0; length]), Memory::Pages);
        Body { memory, length }
    }

    /// A copy of some bytes.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Body {
        let mut body = Body::zeroed(bytes.len());
        body.copy_from_slice(bytes);
        body
    }

    /// Leaves out what comes after so many bytes.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

/// Bytes that are where an allocator has put them.
impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        let length = bytes.len();
        Body { memory: Memory::Heap(bytes), length }
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => &pages.0,
        };
        &all[..self.length]
    }
}

impl DerefMut for Body {
    fn deref_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => &mut pages.0,
        };
        &mut all[..self.length]
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_its_bytes_wherever_they_are() {
        for length in [0, 1, LARGE - 1, LARGE, LARGE + 1] {
            let bytes: Vec<u8> = (0..length).map(|it| u8::try_from(it % 251).unwrap()).collect();
            let mut body = Body::copy_of(&bytes);
            assert_eq!(matches!(body.memory, Memory::Pages(_)), length >= LARGE);
            assert_eq!(body[..], bytes);
            assert_eq!(Body::from(bytes.clone())[..], bytes);
            body.truncate(length / 2);
            body.truncate(length);
            assert_eq!(body[..], bytes[..length / 2]);
        }
    }

    #[test]
    fn there_are_never_more_mappings_than_a_process_may_have() {
        let bodies: Vec<Body> = (0..=MOST).map(|_| Body::zeroed(LARGE)).collect();
        let mapped = bodies.iter().filter(|it| matches!(it.memory, Memory::Pages(_))).count();
        // Another test may have some as well.
        assert!((MOST - 8..=MOST).contains(&mapped), "{mapped}");
        assert_eq!(bodies.last().map(|it| it.len()), Some(LARGE));
        drop(bodies);
        assert!(MAPPED.load(Ordering::Relaxed) < 8);
    }
}
