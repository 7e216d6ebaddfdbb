//! Content codings (RFC 9110 §8.4.1): compression, and the choice of a coding for a client.

use std::io::Write;

/// A part of the entity-tag of each coded representation. It must be raised when a new library or another quality codes
/// the same body to other bytes, which a test notices: two servers of one site must not give one tag to different
/// bytes, and neither must an upgrade during a download that is resumed.
pub const GENERATION: u8 = 1;

/// A compression of a body, declared in the order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Coding {
    /// RFC 7932.
    Brotli,
    /// RFC 1952.
    Gzip,
}

impl Coding {
    /// All of them, the preferred first.
    pub const ALL: [Coding; 2] = [Coding::Brotli, Coding::Gzip];

    /// The registered name (IANA HTTP content codings).
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Coding::Brotli => "br",
            Coding::Gzip => "gzip",
        }
    }

    /// Compresses a body; `None` if that makes it no shorter. Takes some 30 ms a megabyte: not for an async worker.
    #[must_use]
    pub fn encode(self, body: &[u8]) -> Option<Vec<u8>> {
        // A body is compressed once and sent often, but one level more doubles the time for two per cent.
        const BROTLI_QUALITY: u32 = 5;
        const BROTLI_WINDOW: u32 = 22;
        let written = match self {
            Coding::Brotli => {
                let mut encoder =
                    brotli::CompressorWriter::new(Vec::new(), 4096, BROTLI_QUALITY, BROTLI_WINDOW);
                encoder.write_all(body).map(|()| encoder.into_inner())
            }
            Coding::Gzip => {
                let level = flate2::Compression::default();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(body).and_then(|()| encoder.finish())
            }
        };
        written.ok().filter(|coded| coded.len() < body.len())
    }
}

/// The weight that a client gives to each coding, from 0 (refused) to 1000 (RFC 9110 §12.5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptedCodings {
    /// `br`.
    pub brotli: u16,
    /// `gzip`.
    pub gzip: u16,
    /// No coding.
    pub identity: u16,
}

impl AcceptedCodings {
    /// The weights of a client without `Accept-Encoding`: it accepts any coding, and none is the safest.
    pub const UNSAID: AcceptedCodings = AcceptedCodings { brotli: 0, gzip: 0, identity: 1000 };

    /// The coding with the highest weight, or `None` for no coding. Among equals the first coding wins, and no coding
    /// loses. A client that refuses everything available gets no coding, as §12.5.3 recommends.
    #[must_use]
    pub fn best(self, available: impl Iterator<Item = Coding>) -> Option<Coding> {
        let mut best = (None, self.identity);
        for coding in available {
            let weight = self.weight(coding);
            if weight > best.1 || (weight == best.1 && weight > 0 && best.0.is_none()) {
                best = (Some(coding), weight);
            }
        }
        best.0
    }

    fn weight(self, coding: Coding) -> u16 {
        match coding {
            Coding::Brotli => self.brotli,
            Coding::Gzip => self.gzip,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::image::Version;

    #[test]
    fn a_coded_body_decodes_to_what_it_was() {
        let body = "<path d='M0 0L1 1'/>".repeat(100).into_bytes();
        let gzip = Coding::Gzip.encode(&body).unwrap();
        let mut decoded = Vec::new();
        flate2::read::GzDecoder::new(&gzip[..]).read_to_end(&mut decoded).unwrap();
        assert_eq!(decoded, body);
        let brotli = Coding::Brotli.encode(&body).unwrap();
        let mut decoded = Vec::new();
        brotli::Decompressor::new(&brotli[..], 4096).read_to_end(&mut decoded).unwrap();
        assert_eq!(decoded, body);
    }

    #[test]
    fn a_body_is_coded_to_the_same_bytes_in_every_build_of_a_generation() {
        let body = "<path d='M0 0L1 1'/>".repeat(100).into_bytes();
        let version = |coding: Coding| Version::of(&coding.encode(&body).unwrap()).to_string();
        assert_eq!(GENERATION, 1);
        assert_eq!(version(Coding::Brotli), "eb5d3f76b0d33b3ad4b6da58f3168470");
        assert_eq!(version(Coding::Gzip), "f67e6593505cd6b319c4b963637c2ffc");
    }

    #[test]
    fn a_body_that_would_get_no_shorter_is_not_coded() {
        assert_eq!(Coding::Gzip.encode(b"<svg/>"), None);
        assert_eq!(Coding::Brotli.encode(b""), None);
    }

    #[test]
    fn the_coding_with_the_highest_weight_wins_and_no_coding_loses_a_draw() {
        let best = |brotli, gzip, identity| {
            AcceptedCodings { brotli, gzip, identity }.best(Coding::ALL.into_iter())
        };
        assert_eq!(best(1000, 1000, 1), Some(Coding::Brotli));
        assert_eq!(best(500, 600, 1), Some(Coding::Gzip));
        assert_eq!(best(0, 1, 1), Some(Coding::Gzip));
        assert_eq!(best(500, 500, 600), None);
        assert_eq!(best(0, 0, 0), None);
        assert_eq!(AcceptedCodings::UNSAID.best(Coding::ALL.into_iter()), None);
        let gzip_only = [Coding::Gzip].into_iter();
        assert_eq!(
            AcceptedCodings { brotli: 9, gzip: 5, identity: 1 }.best(gzip_only),
            Some(Coding::Gzip)
        );
    }
}
