//! A reader that ends a decoder that takes too long.

use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};

use super::super::RenderLimits;

/// A reader that fails after the deadline, and with it the decoder.
pub(super) struct DeadlineReader<'a> {
    bytes: Cursor<&'a [u8]>,
    limits: RenderLimits,
}

impl<'a> DeadlineReader<'a> {
    pub(super) fn new(bytes: &'a [u8], limits: RenderLimits) -> DeadlineReader<'a> {
        DeadlineReader { bytes: Cursor::new(bytes), limits }
    }

    fn check(&self) -> io::Result<()> {
        self.limits.check_time().map_err(|late| io::Error::new(io::ErrorKind::TimedOut, late))
    }
}

impl Read for DeadlineReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        self.bytes.read(buffer)
    }
}

impl BufRead for DeadlineReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        /// Bytes that are read between two looks at the time.
        const PIECE: usize = 64 * 1024;
        self.check()?;
        let rest = self.bytes.fill_buf()?;
        Ok(&rest[..rest.len().min(PIECE)])
    }

    fn consume(&mut self, read: usize) {
        self.bytes.consume(read);
    }
}

impl Seek for DeadlineReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(to)
    }
}
