//! The other end of a connection, and the clients behind it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A socket address.
    Tcp(SocketAddr),
    /// A program on this machine, over a Unix socket: as a rule a proxy, whose clients are unknown.
    Unix,
    /// A client that a trusted proxy named before the first byte of its connection (PROXY protocol).
    Proxied(SocketAddr),
}

/// The client of a request: the peer, unless trusted proxies name another one for this request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Client {
    peer: Peer,
    /// The address that the trusted proxies name.
    forwarded: Option<IpAddr>,
}

/// The one to whom the things that the server holds and does are accounted.
///
/// An IPv6 client has a whole network of addresses to choose from (RFC 6177), so its network counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerKey {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// The first 64 bits of an IPv6 address.
    V6Network([u8; 8]),
    /// All programs that connect over a Unix socket.
    Unix,
}

impl Peer {
    /// Returns whether it is a socket of this machine. The address in a PROXY header is one of the proxy's machine.
    pub(crate) fn is_loopback(self) -> bool {
        match self {
            Peer::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Peer::Unix | Peer::Proxied(_) => false,
        }
    }

    /// Returns its address, without the mapping of IPv4 into IPv6.
    pub(crate) fn ip(self) -> Option<IpAddr> {
        match self {
            Peer::Tcp(address) | Peer::Proxied(address) => Some(address.ip().to_canonical()),
            Peer::Unix => None,
        }
    }

    /// Returns the one to whom a connection of this peer's is accounted.
    pub(crate) fn share(self) -> PeerKey {
        self.ip().map_or(PeerKey::Unix, PeerKey::of)
    }
}

impl Client {
    /// Creates a client that trusted proxies name.
    pub(crate) fn behind(peer: Peer, address: IpAddr) -> Client {
        Client { peer, forwarded: Some(address.to_canonical()) }
    }

    /// Returns the one to whom a request of this client's is accounted.
    pub(crate) fn share(&self) -> PeerKey {
        self.forwarded.map_or_else(|| self.peer.share(), PeerKey::of)
    }

    /// Returns the other end of the connection.
    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }

    /// Returns its address, if it isn't the peer's.
    pub(crate) fn forwarded(&self) -> Option<IpAddr> {
        self.forwarded
    }
}

impl From<Peer> for Client {
    fn from(peer: Peer) -> Client {
        Client { peer, forwarded: None }
    }
}

impl PeerKey {
    fn of(address: IpAddr) -> PeerKey {
        match address.to_canonical() {
            IpAddr::V4(address) => PeerKey::V4(address),
            IpAddr::V6(address) => {
                let mut network = [0; 8];
                network.copy_from_slice(&address.octets()[..8]);
                PeerKey::V6Network(network)
            }
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) | Peer::Proxied(address) => address.fmt(f),
            Peer::Unix => f.write_str("unix"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str) -> Peer {
        Peer::Tcp(address.parse().unwrap())
    }

    #[test]
    fn a_share_belongs_to_an_ipv4_address_or_to_an_ipv6_network() {
        assert_eq!(tcp("192.0.2.1:1").share(), tcp("192.0.2.1:2").share());
        assert_eq!(tcp("192.0.2.1:1").share(), tcp("[::ffff:192.0.2.1]:1").share());
        assert_ne!(tcp("192.0.2.1:1").share(), tcp("192.0.2.2:1").share());
        assert_eq!(tcp("[2001:db8::1]:1").share(), tcp("[2001:db8::ffff:1]:1").share());
        assert_ne!(tcp("[2001:db8::1]:1").share(), tcp("[2001:db8:0:1::1]:1").share());
        let proxy = tcp("192.0.2.1:1");
        let client = Client::behind(proxy, [198, 51, 100, 7].into());
        assert_eq!(client.share(), tcp("198.51.100.7:9").share());
        assert_eq!(Client::from(proxy).share(), proxy.share());
        assert_eq!(Peer::Proxied("198.51.100.7:9".parse().unwrap()).share(), client.share());
    }

    #[test]
    fn an_address_that_a_proxy_names_is_none_of_this_machine() {
        assert!(tcp("127.0.0.1:1").is_loopback() && tcp("[::ffff:127.0.0.1]:1").is_loopback());
        assert!(!Peer::Proxied("127.0.0.1:1".parse().unwrap()).is_loopback());
        assert!(!Peer::Unix.is_loopback());
    }
}
