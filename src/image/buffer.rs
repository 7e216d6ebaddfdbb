//! The memory that an image is decoded into.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::MmapMut;

/// Bodies from this many bytes on have pages of their own.
const LARGE: usize = 128 * 1024;

/// Those that have. Linux lets a process have 65,530 mappings, and others need some too.
static MAPPINGS: Mappings = Mappings { count: AtomicUsize::new(0), most: 32 * 1024 };

/// How many bodies have pages of their own, and how many may.
struct Mappings {
    count: AtomicUsize,
    most: usize,
}

/// The bytes of an image that was decoded.
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

/// Pages that are counted.
struct Pages {
    map: MmapMut,
    among: &'static Mappings,
}

impl Mappings {
    fn map(&'static self, length: usize) -> Option<Pages> {
        if self.count.fetch_add(1, Ordering::Relaxed) < self.most
            && let Ok(map) = MmapMut::map_anon(length)
        {
            return Some(Pages { map, among: self });
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.among.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Body {
    /// Zeros, to be written over.
    #[must_use]
    pub fn zeroed(length: usize) -> Body {
        Body::zeroed_among(&MAPPINGS, length)
    }

    fn zeroed_among(mappings: &'static Mappings, length: usize) -> Body {
        let pages = if length < LARGE { None } else { mappings.map(length) };
        let memory = pages.map_or_else(|| Memory::Heap(vec![0; length]), Memory::Pages);
        Body { memory, length }
    }

    /// Leaves out what comes after so many bytes.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => &pages.map,
        };
        &all[..self.length]
    }
}

impl DerefMut for Body {
    fn deref_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Pages(pages) => &mut pages.map,
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
            let mut body = Body::zeroed(length);
            assert!(body.len() == length && body.iter().all(|it| *it == 0));
            assert_eq!(matches!(body.memory, Memory::Pages(_)), length >= LARGE);
            body.copy_from_slice(&bytes);
            assert_eq!(body[..], bytes);
            body.truncate(length / 2);
            body.truncate(length);
            assert_eq!(body[..], bytes[..length / 2]);
        }
    }

    #[test]
    fn there_are_no_more_mappings_than_there_may_be() {
        static THREE: Mappings = Mappings { count: AtomicUsize::new(0), most: 3 };
        for _ in 0..2 {
            let bodies: Vec<_> = (0..5).map(|_| Body::zeroed_among(&THREE, LARGE)).collect();
            let mapped = bodies.iter().filter(|it| matches!(it.memory, Memory::Pages(_)));
            assert_eq!(mapped.count(), 3);
            assert!(bodies.iter().all(|it| it.len() == LARGE));
        }
        assert_eq!(THREE.count.load(Ordering::Relaxed), 0);
    }
}
