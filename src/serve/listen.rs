//! Connections: accepted under a limit, with timeouts, in the clear or by TLS, and closed in order.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::state::Limits;
use crate::{Error, Result};

/// Where the system has no more room for connections.
const PAUSE: Duration = Duration::from_millis(50);
/// For the ends of answers that were hurried.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What is not read by the other side for so long ends the connection.
const UNREAD: Duration = Duration::from_secs(60);

/// # Errors
/// Files that are no certificate and key, or that do not belong together.
pub fn tls(certificates: &Path, key: &Path) -> Result<TlsAcceptor> {
    let bad = |path: &Path, said: String| Error::file(path, format!("{said}: give a PEM file"));
    let chain: Vec<CertificateDer> = CertificateDer::pem_file_iter(certificates)
        .and_then(|found| found.collect())
        .map_err(|e| bad(certificates, e.to_string()))?;
    if chain.is_empty() {
        return Err(bad(certificates, "holds no certificate".into()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, e.to_string()))?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| {
            config
                .with_no_client_auth()
                .with_single_cert(chain, private)
        })
        .map_err(|e| bad(certificates, e.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until `closing` is done; then takes no more, and returns when every connection has ended, or after `limits.grace` and a call of
/// `hurry`, which ends what is under way.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: &Limits,
    closing: impl Future<Output = ()>,
    hurry: impl FnOnce(),
) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.connections));
    let header_timeout = limits.header_timeout;
    let mut closing = std::pin::pin!(closing);
    loop {
        let accept = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place.expect("never closed"))
        };
        let (accepted, place) = tokio::select! {
            accepted = accept => accepted,
            () = &mut closing => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // One that has left already, or no more files: others will come.
                tracing::debug!("a connection was not accepted: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        set_up(&stream);
        let (router, watcher, tls) = (router.clone(), graceful.watcher(), tls.clone());
        tokio::spawn(async move {
            let _place = place;
            match tls {
                None => talk(stream, router, watcher, header_timeout).await,
                Some(tls) => {
                    let shaken = tokio::time::timeout(header_timeout, tls.accept(stream)).await;
                    match shaken {
                        Ok(Ok(stream)) => talk(stream, router, watcher, header_timeout).await,
                        Ok(Err(error)) => tracing::debug!("no TLS: {error}"),
                        Err(_) => tracing::debug!("no TLS in time"),
                    }
                }
            }
        });
    }
    drop(listener);
    let mut ended = std::pin::pin!(graceful.shutdown());
    if tokio::time::timeout(limits.grace, &mut ended)
        .await
        .is_err()
    {
        hurry();
        let _ = tokio::time::timeout(LAST_WORDS, ended).await;
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
    header_timeout: Duration,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!("a connection ended: {error}");
    }
}

/// Tokens leave at once, and a reader that does not read is not waited for.
fn set_up(stream: &TcpStream) {
    let set = stream.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let set = set.and(
        rustix::net::sockopt::set_tcp_user_timeout(stream, UNREAD.as_millis() as u32)
            .map_err(std::io::Error::from),
    );
    if let Err(error) = set {
        tracing::debug!("a connection keeps its defaults: {error}");
    }
}
