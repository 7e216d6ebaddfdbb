//! TLS on a listener, and the renewal of its certificate while the server runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use crate::settings;

/// The TLS of a listener.
#[derive(Clone)]
pub(super) struct Tls {
    pub(super) acceptor: TlsAcceptor,
    certificate: Arc<Certificate>,
    /// Modification times of the two files, taken before they were read.
    seen: (Option<SystemTime>, Option<SystemTime>),
    interval: Duration,
}

/// The newest certificate and key of the two files that fit together.
#[derive(Debug)]
struct Certificate {
    chain_file: PathBuf,
    key_file: PathBuf,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Tls {
    /// Loads the certificate of the settings. Returns `None` if they name none.
    pub(super) fn load(settings: &settings::HttpSettings) -> anyhow::Result<Option<Tls>> {
        let (certificate_file, key_file) = (&settings.tls_cert_file, &settings.tls_key_file);
        match (certificate_file.as_os_str().is_empty(), key_file.as_os_str().is_empty()) {
            (true, true) => return Ok(None),
            (false, false) => {}
            _ => anyhow::bail!("set both [http] tls_cert_file and tls_key_file, or none"),
        }
        // Taken first: files that are written in between are read again.
        let seen = (modified(certificate_file), modified(key_file));
        let certificate = Arc::new(Certificate {
            current: RwLock::new(Arc::new(read(certificate_file, key_file)?)),
            chain_file: certificate_file.clone(),
            key_file: key_file.clone(),
        });
        let resolver: Arc<dyn ResolvesServerCert> = Arc::<Certificate>::clone(&certificate);
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .context("TLS")?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Ok(Some(Tls { acceptor, certificate, seen, interval: settings.tls_reload_interval }))
    }

    /// Checks the files at an interval and at each reload, for ever. A pair that doesn't fit, as while it is being written, is
    /// logged and not used.
    pub(super) async fn keep_current(self, reloaded: Arc<Notify>) {
        let (certificate_file, key_file) =
            (&self.certificate.chain_file, &self.certificate.key_file);
        let mut last = self.seen;
        loop {
            let _ = tokio::time::timeout(self.interval, reloaded.notified()).await;
            let now = (modified(certificate_file), modified(key_file));
            if now == last {
                continue;
            }
            match read(certificate_file, key_file) {
                Ok(key) => {
                    self.certificate.replace(key);
                    last = now;
                    tracing::info!(file = %certificate_file.display(), "certificate renewed");
                }
                Err(error) => {
                    tracing::error!(error = %format!("{error:#}"), "certificate not renewed");
                }
            }
        }
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tls").field(&self.certificate.chain_file).finish()
    }
}

impl Certificate {
    fn replace(&self, key: CertifiedKey) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn modified(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|it| it.modified()).ok()
}

fn read(certificate_file: &Path, key_file: &Path) -> anyhow::Result<CertifiedKey> {
    let chain = CertificateDer::pem_file_iter(certificate_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("{} ([http] tls_cert_file)", certificate_file.display()))?;
    anyhow::ensure!(
        !chain.is_empty(),
        "{} has no certificate ([http] tls_cert_file)",
        certificate_file.display()
    );
    let key = PrivateKeyDer::from_pem_file(key_file)
        .with_context(|| format!("{} ([http] tls_key_file)", key_file.display()))?;
    CertifiedKey::from_der(chain, key, &ring::default_provider()).with_context(|| {
        let (certificate, key) = (certificate_file.display(), key_file.display());
        format!("{certificate} and {key} don't fit together ([http] tls_cert_file, tls_key_file)")
    })
}
