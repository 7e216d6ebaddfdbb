//! The way to a server.

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult};

/// Opens connections to the server behind an address.
#[derive(Debug, Clone)]
#[cfg_attr(
    test,
    expect(clippy::large_enum_variant, reason = "there are few, and one kind outside of tests")
)]
pub(super) enum Connector {
    /// To a real one.
    Redis(Client),
    /// To a simulated one, in this process.
    #[cfg(test)]
    Simulated(super::simulation::Network, redis::ProtocolVersion),
}

impl Connector {
    pub(super) async fn connect(
        &self,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        match self {
            Connector::Redis(client) => {
                client.get_multiplexed_async_connection_with_config(config).await
            }
            #[cfg(test)]
            Connector::Simulated(network, protocol) => network.connect(*protocol, config).await,
        }
    }
}
