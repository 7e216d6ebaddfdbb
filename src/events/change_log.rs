//! The log of changed images: what each stream with a prefix has to read since it read last, kept once for all of them.

use std::collections::{BTreeMap, HashMap};

use crate::image::ImageId;

/// Most images that the log has. A stream that is further behind begins again with a listing.
const MOST: usize = 16 * 1024;

/// Most entries that one reading looks at, and most images that it gives. A lock is held meanwhile.
const LOOKED_AT: usize = 1024;
const GIVEN: usize = 32;

/// Changed images in the order of their last change, each once.
#[derive(Debug, Default)]
pub(super) struct ChangeLog {
    images: BTreeMap<u64, ImageId>,
    numbers: HashMap<ImageId, u64>,
    /// Number of the next change.
    end: u64,
    /// Changes with lower numbers have left the log.
    beginning: u64,
}

/// A part of the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Changes {
    /// Images that have changed.
    pub(super) ids: Vec<ImageId>,
    /// Number from which the reading goes on; `None` at the end of the log.
    pub(super) next: Option<u64>,
}

impl ChangeLog {
    /// Number of the next change.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Notes a change. Gives its number.
    pub(super) fn note(&mut self, id: &ImageId) -> u64 {
        let number = self.end;
        self.end += 1;
        if let Some(earlier) = self.numbers.insert(id.clone(), number) {
            self.images.remove(&earlier);
        }
        self.images.insert(number, id.clone());
        if self.images.len() > MOST
            && let Some((number, id)) = self.images.pop_first()
        {
            self.numbers.remove(&id);
            self.beginning = number + 1;
        }
        number
    }

    /// Returns whether every change from this number on is there.
    pub(super) fn reaches(&self, from: u64) -> bool {
        from >= self.beginning
    }

    /// Reads some of the changes of images with a prefix; `None` if some have left the log.
    pub(super) fn read(&self, from: u64, prefix: &str) -> Option<Changes> {
        if !self.reaches(from) {
            return None;
        }
        let mut ids = Vec::new();
        for (looked_at, (number, id)) in self.images.range(from..).enumerate() {
            if looked_at == LOOKED_AT || ids.len() == GIVEN {
                return Some(Changes { ids, next: Some(*number) });
            }
            if id.as_str().starts_with(prefix) {
                ids.push(id.clone());
            }
        }
        Some(Changes { ids, next: None })
    }

    /// Forgets all changes: nobody reads them.
    pub(super) fn clear(&mut self) {
        self.images = BTreeMap::new();
        self.numbers = HashMap::new();
        self.beginning = self.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> ImageId {
        ImageId::parse(&format!("i{number}")).unwrap()
    }

    fn read_all(log: &ChangeLog, mut from: u64, prefix: &str) -> Vec<ImageId> {
        let mut ids = Vec::new();
        loop {
            let changes = log.read(from, prefix).unwrap();
            assert!(changes.ids.len() <= GIVEN);
            ids.extend(changes.ids);
            let Some(next) = changes.next else { return ids };
            from = next;
        }
    }

    #[test]
    fn each_image_is_read_once_after_its_last_change() {
        let mut log = ChangeLog::default();
        for number in [1, 2, 1, 3, 20] {
            log.note(&id(number));
        }
        assert_eq!(read_all(&log, 0, "i"), [2, 1, 3, 20].map(id));
        assert_eq!(read_all(&log, 0, "i2"), [2, 20].map(id));
        assert_eq!(read_all(&log, 3, "i"), [3, 20].map(id));
        assert_eq!(read_all(&log, log.end(), "i"), []);
    }

    #[test]
    fn a_long_log_is_read_in_parts_and_a_reader_that_is_too_late_is_told() {
        let mut log = ChangeLog::default();
        for number in 0..MOST {
            log.note(&id(number));
        }
        assert_eq!(read_all(&log, 0, "").len(), MOST);
        // Another change of an image that is there pushes none out.
        log.note(&id(MOST - 1));
        assert!(log.reaches(0));
        log.note(&id(MOST));
        assert_eq!(log.images.len(), MOST);
        assert_eq!(log.read(0, "i"), None);
        assert_eq!(read_all(&log, 1, "").len(), MOST);
        log.clear();
        assert!(!log.reaches(1) && read_all(&log, log.end(), "").is_empty());
    }
}
