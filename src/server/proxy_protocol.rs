//! The PROXY protocol, versions 1 and 2: the header by which a proxy names the client of a connection.
//!
//! The specification is `doc/proxy-protocol.txt` of `HAProxy`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// The bytes that open a header of version 2.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Longest line of version 1, with its end.
const LONGEST_LINE: usize = 107;

/// Longest block of addresses and extensions of version 2: more than any proxy sends.
const LONGEST_BLOCK: u16 = 4096;

/// Reads the header and nothing behind it. Returns the client's address, or `None` where the proxy speaks for itself or knows
/// none.
pub(crate) async fn read(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut start = [0; SIGNATURE.len()];
    io.read_exact(&mut start).await?;
    if start == SIGNATURE {
        return read_version_2(io).await;
    }
    if !start.starts_with(b"PROXY ") {
        return Err(malformed("there is none"));
    }
    let mut line = start.to_vec();
    // Byte by byte: what follows the line belongs to the connection.
    while !line.ends_with(b"\r\n") {
        if line.len() == LONGEST_LINE {
            return Err(malformed("its line is too long"));
        }
        line.push(io.read_u8().await?);
    }
    let line = str::from_utf8(&line[..line.len() - 2])
        .map_err(|_not_ascii| malformed("its line isn't ASCII"))?;
    version_1(line)
}

fn malformed(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Parses a line: `PROXY TCP4 192.0.2.1 198.51.100.1 56324 443`.
fn version_1(line: &str) -> io::Result<Option<SocketAddr>> {
    let words: Vec<&str> = line.split(' ').collect();
    let addresses = |source: &str, target: &str, ports: [&str; 2]| {
        let port = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>().ok().filter(|_| digits)
        };
        let addresses: (IpAddr, IpAddr) = (source.parse().ok()?, target.parse().ok()?);
        port(ports[1])?;
        Some((addresses, SocketAddr::new(addresses.0, port(ports[0])?)))
    };
    match words[..] {
        // The rest of the line says nothing.
        ["PROXY", "UNKNOWN", ..] => Ok(None),
        ["PROXY", family @ ("TCP4" | "TCP6"), source, target, from, to] => {
            let is_4 = family == "TCP4";
            match addresses(source, target, [from, to]) {
                Some(((source, target), client))
                    if source.is_ipv4() == is_4 && target.is_ipv4() == is_4 =>
                {
                    Ok(Some(client))
                }
                _ => Err(malformed("its addresses are malformed")),
            }
        }
        _ => Err(malformed("its line is malformed")),
    }
}

async fn read_version_2(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut head = [0; 4];
    io.read_exact(&mut head).await?;
    let [version_and_command, family, length @ ..] = head;
    let length = u16::from_be_bytes(length);
    if length > LONGEST_BLOCK {
        return Err(malformed("its block is too long"));
    }
    let mut block = vec![0; usize::from(length)];
    io.read_exact(&mut block).await?;
    let is_local = match version_and_command {
        // The proxy's own connection, such as a health check.
        0x20 => true,
        0x21 => false,
        _ => return Err(malformed("its version or command is unknown")),
    };
    // Connections of other kinds have no client with an address.
    let client = match (family, &block[..]) {
        _ if is_local => None,
        (0x11, block) if block.len() >= 12 => {
            let ip = Ipv4Addr::new(block[0], block[1], block[2], block[3]);
            let port = u16::from_be_bytes([block[8], block[9]]);
            Some(SocketAddr::new(ip.into(), port))
        }
        (0x21, block) if block.len() >= 36 => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&block[..16]);
            let port = u16::from_be_bytes([block[32], block[33]]);
            Some(SocketAddr::new(Ipv6Addr::from(octets).into(), port))
        }
        (0x11 | 0x21, _) => return Err(malformed("its addresses are cut off")),
        _ => None,
    };
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a header, and returns the client with the bytes that are left.
    fn parse(mut bytes: &[u8]) -> io::Result<(Option<SocketAddr>, Vec<u8>)> {
        let client = futures_util::FutureExt::now_or_never(read(&mut bytes)).unwrap()?;
        Ok((client, bytes.to_vec()))
    }

    fn version_2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, block].concat()
    }

    const V4: [u8; 12] = [192, 0, 2, 1, 10, 0, 0, 1, 0x12, 0x34, 0, 80];

    #[test]
    fn a_header_names_the_client_and_nothing_behind_it_is_read() {
        let v6 = [
            &Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets()[..],
            &[0; 16],
            &[0, 9],
            &[0, 80],
        ];
        let with_extension = [&V4[..], &[0x20, 0, 1, 7]].concat();
        for (header, expected) in [
            (b"PROXY TCP4 192.0.2.1 10.0.0.1 4660 80\r\n".to_vec(), Some("192.0.2.1:4660")),
            (b"PROXY TCP6 2001:db8::1 ::1 9 80\r\n".to_vec(), Some("[2001:db8::1]:9")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(), None),
            (version_2(0x21, 0x11, &V4), Some("192.0.2.1:4660")),
            (version_2(0x21, 0x11, &with_extension), Some("192.0.2.1:4660")),
            (version_2(0x21, 0x21, &v6.concat()), Some("[2001:db8::1]:9")),
            (version_2(0x20, 0x00, b""), None),
            (version_2(0x20, 0x11, &V4), None),
            (version_2(0x21, 0x31, &[0; 216]), None),
            (version_2(0x21, 0x00, b""), None),
        ] {
            let (client, rest) = parse(&[&header[..], b"GET /"].concat()).unwrap();
            assert_eq!(client.map(|it| it.to_string()).as_deref(), expected, "{header:?}");
            assert_eq!(rest, b"GET /");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            b"GET /images/a HTTP/1.1\r\n\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 4660\r\n     ".to_vec(),
            b"PROXY TCP4 2001:db8::1 ::1 9 80\r\n".to_vec(),
            b"PROXY TCP6 192.0.2.1 10.0.0.1 4660 80\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 +1 80\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 10.0.0.1 70000 80\r\n".to_vec(),
            b"PROXY  TCP4 192.0.2.1 10.0.0.1 1 80\r\n".to_vec(),
            b"PROXY UDP4 192.0.2.1 10.0.0.1 1 80\r\n".to_vec(),
            [&b"PROXY UNKNOWN "[..], &[b'x'; 100]].concat(),
            version_2(0x11, 0x11, &V4),
            version_2(0x22, 0x11, &V4),
            version_2(0x21, 0x11, &V4[..11]),
            version_2(0x21, 0x21, &V4),
            version_2(0x21, 0x11, &[0; 5000]),
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
    }

    /// Changes good headers at random places, as a fuzzer would.
    #[test]
    fn no_bytes_make_it_panic_or_read_past_its_bounds() {
        let mut random = fastrand::Rng::with_seed(7);
        let good = [
            b"PROXY TCP4 192.0.2.1 10.0.0.1 4660 80\r\n".to_vec(),
            b"PROXY TCP6 2001:db8::1 ::1 9 80\r\n".to_vec(),
            version_2(0x21, 0x11, &V4),
            version_2(0x21, 0x21, &[7; 40]),
        ];
        for round in 0..200_000 {
            let mut bytes = good[round % good.len()].clone();
            for _ in 0..random.usize(1..4) {
                let place = random.usize(..bytes.len());
                match random.u8(..3) {
                    0 => bytes[place] = random.u8(..),
                    1 => bytes.truncate(place.max(1)),
                    _ => bytes.insert(place, random.u8(..)),
                }
            }
            let mut rest = &bytes[..];
            let read = futures_util::FutureExt::now_or_never(read(&mut rest)).unwrap();
            if let Ok(Some(client)) = read {
                assert!(bytes.len() - rest.len() <= 16 + usize::from(LONGEST_BLOCK), "{client}");
            }
        }
    }
}
