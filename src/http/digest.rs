//! Digests that a request gives of its own body (RFC 9530), so that a body damaged on its way isn't stored.

use axum::http::{HeaderMap, HeaderName};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256, Sha512};

/// The fields of RFC 9530 §2 and §3. Uploads have no content coding, so both mean the same here.
const FIELDS: [HeaderName; 2] =
    [HeaderName::from_static("content-digest"), HeaderName::from_static("repr-digest")];

/// Most digests of one request. Two fields with two algorithms make four.
const MOST: usize = 16;

/// The digests that a body must have, each once, by the algorithms that are known here. Other algorithms, which §5 calls
/// insecure or which came later, are ignored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Digests(Vec<(Algorithm, Vec<u8>)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    const ALL: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

    /// The length of a digest, in bytes.
    const fn length(self) -> usize {
        match self {
            Algorithm::Sha256 => 32,
            Algorithm::Sha512 => 64,
        }
    }

    /// The key in the registry of RFC 9530 §7.2.
    const fn key(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha-256",
            Algorithm::Sha512 => "sha-512",
        }
    }

    fn of(self, body: &[u8]) -> Vec<u8> {
        match self {
            Algorithm::Sha256 => Sha256::digest(body).to_vec(),
            Algorithm::Sha512 => Sha512::digest(body).to_vec(),
        }
    }
}

impl Digests {
    /// Parses the digests of a request. A digest that is no byte sequence of its algorithm's length is an error, whose
    /// text is for the client, and so are too many.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Digests, String> {
        let (mut digests, mut members) = (Vec::new(), 0);
        for name in &FIELDS {
            for line in headers.get_all(name) {
                let line = line.to_str().map_err(|_not_ascii| format!("`{name}` must be ASCII"))?;
                // A dictionary of structured fields (RFC 9651 §3.2). Byte sequences have no comma, and a value that may
                // have one belongs to a key that is ignored.
                for member in line.split(',') {
                    let (key, value) = member.split_once('=').unwrap_or((member, ""));
                    let known = Algorithm::ALL.into_iter().find(|it| it.key() == key.trim_ascii());
                    if let Some(algorithm) = known {
                        let digest = byte_sequence(value)
                            .filter(|it| it.len() == algorithm.length())
                            .ok_or_else(|| {
                                format!(
                                    "`{}` of `{name}` must be {} bytes in base64 between colons",
                                    algorithm.key(),
                                    algorithm.length()
                                )
                            })?;
                        members += 1;
                        if members > MOST {
                            return Err(format!("`{name}` must have at most {MOST} digests"));
                        }
                        if !digests.contains(&(algorithm, digest.clone())) {
                            digests.push((algorithm, digest));
                        }
                    }
                }
            }
        }
        Ok(Digests(digests))
    }

    /// The first algorithm whose digest the body doesn't have. Takes about two milliseconds a megabyte, once for each
    /// algorithm: not for an async worker.
    pub(crate) fn contradiction(&self, body: &[u8]) -> Option<&'static str> {
        let differs = |algorithm: &Algorithm| {
            let mut given =
                self.0.iter().filter(|(it, _)| it == algorithm).map(|(_, digest)| digest);
            match (given.next(), given.next()) {
                (None, _) => false,
                (Some(digest), None) => algorithm.of(body) != *digest,
                // No body has two.
                (Some(_), Some(_)) => true,
            }
        };
        Algorithm::ALL.iter().find(|it| differs(it)).map(|algorithm| algorithm.key())
    }
}

/// Parses a byte sequence (RFC 9651 §3.3.5) and drops its parameters.
fn byte_sequence(text: &str) -> Option<Vec<u8>> {
    let (base64, parameters) = text.trim_ascii().strip_prefix(':')?.split_once(':')?;
    let ends = parameters.is_empty() || parameters.starts_with(';');
    STANDARD.decode(base64).ok().filter(|_| ends)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn digests(lines: &[(&'static str, &str)]) -> Result<Digests, String> {
        let mut headers = HeaderMap::new();
        for (name, line) in lines {
            headers.append(*name, HeaderValue::from_str(line).unwrap());
        }
        Digests::of(&headers)
    }

    /// Of `{"hello": "world"}` and a line feed, as RFC 9530 §B.1 gives it.
    const SHA_256: &str = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:";

    #[test]
    fn a_digest_is_compared_with_the_body() {
        let body = b"{\"hello\": \"world\"}\n";
        for line in [SHA_256.to_owned(), format!("md5=:AAAA:, {SHA_256};a=1 ,unixsum=5")] {
            for name in ["content-digest", "repr-digest"] {
                let digests = digests(&[(name, &line)]).unwrap();
                assert_eq!(digests.contradiction(body), None, "{line}");
                assert_eq!(digests.contradiction(b"{\"hello\": \"w0rld\"}\n"), Some("sha-256"));
            }
        }
        let sha_512 = format!("sha-512=:{}:", STANDARD.encode(Sha512::digest(body)));
        let both = digests(&[("content-digest", SHA_256), ("content-digest", &sha_512)]).unwrap();
        assert_eq!((both.0.len(), both.contradiction(body)), (2, None));
        assert_eq!(both.contradiction(b""), Some("sha-256"));
    }

    #[test]
    fn each_digest_counts_once_and_two_of_one_algorithm_contradict_any_body() {
        let body = b"{\"hello\": \"world\"}\n";
        let line = |times: usize| [SHA_256; MOST + 1][..times].join(", ");
        let same = digests(&[("content-digest", &line(10)), ("repr-digest", SHA_256)]).unwrap();
        assert_eq!((same.0.len(), same.contradiction(body)), (1, None));
        let other = format!("sha-256=:{}:", STANDARD.encode([0; 32]));
        let two = digests(&[("content-digest", SHA_256), ("repr-digest", &other)]).unwrap();
        assert_eq!(two.contradiction(body), Some("sha-256"));
        assert!(digests(&[("content-digest", &line(MOST))]).is_ok());
        let error = digests(&[("content-digest", &line(MOST + 1))]).unwrap_err();
        assert!(error.contains("at most 16"), "{error}");
    }

    #[test]
    fn an_unknown_algorithm_is_ignored() {
        for line in ["", "md5=:AAAA:", "unixsum=5, foo=\"a\""] {
            assert_eq!(digests(&[("content-digest", line)]), Ok(Digests::default()), "{line}");
        }
        assert_eq!(digests(&[]), Ok(Digests::default()));
    }

    #[test]
    fn a_malformed_digest_is_refused_with_its_name() {
        for value in [
            "",
            "?1",
            "AAAA",
            ":AAAA:",
            ":AAAA",
            ":!:",
            ":RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:x",
        ] {
            let line = format!("sha-256={value}");
            let error = digests(&[("content-digest", &line)]).unwrap_err();
            assert!(error.contains("content-digest") && error.contains("sha-256"), "{error}");
        }
    }
}
