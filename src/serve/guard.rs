//! What every request passes: who asks, from where, and what is written down of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::state::{Client, Server};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Of a client's own name for a request.
const LONGEST_ID: usize = 128;
/// Bytes of a refused request's body that are taken, and for how long.
const MOST_REFUSED: usize = 64 << 10;
const REFUSED_FOR: Duration = Duration::from_secs(2);

/// Names the request, counts it and writes it down.
pub async fn watch(
    State(server): State<Arc<Server>>,
    mut request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    let sent = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok());
    let plain = |id: &&str| {
        !id.is_empty() && id.len() <= LONGEST_ID && id.chars().all(|c| c.is_ascii_graphic())
    };
    let id = sent.filter(plain).map(str::to_owned);
    let id = id.unwrap_or_else(|| server.name("req-"));
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned());
    let method = request.method().clone();
    request.extensions_mut().insert(Client {
        key: None,
        place: None,
        request: id.clone(),
        begun,
    });
    let mut response = next.run(request).await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    server.metrics.request(&route, status);
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    // Probes come every few seconds.
    match route.as_str() {
        "/health" | "/ready" | "/metrics" | "/api/models" => {
            tracing::debug!(request = id, %method, route, status, ms, "request");
        }
        _ => tracing::info!(request = id, %method, route, status, ms, "request"),
    }
    response
}

/// Answers without having read the request. What the client is still sending is taken, so that it reads the answer and its connection is
/// good for the next request; of one that sends much the connection ends.
pub async fn refuse(request: Request, error: ApiError) -> Response {
    let rest = axum::body::to_bytes(request.into_body(), MOST_REFUSED);
    let _ = tokio::time::timeout(REFUSED_FOR, rest).await;
    error.into_response()
}

/// Lets pass who has a key, where keys are asked for.
pub async fn key(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    if !server.keys.is_empty() {
        let sent = request.headers().get(header::AUTHORIZATION);
        let sent = sent.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let Some(key) = sent.and_then(|sent| server.keys.find(sent.trim())) else {
            return refuse(request, ApiError::unauthorized()).await;
        };
        // Looking is free; answers are counted.
        let counts = request.method() == axum::http::Method::POST;
        let place = match counts.then(|| key.begin()).transpose() {
            Ok(place) => place.map(Arc::new),
            Err(error) => return refuse(request, error).await,
        };
        if let Some(client) = request.extensions_mut().get_mut::<Client>() {
            client.key = Some(key.clone());
            client.place = place;
        }
    }
    next.run(request).await
}

/// Refuses what a page of another site sends through a browser of this machine.
pub async fn origin(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    match check_origin(&server, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(request, error).await,
    }
}

/// # Errors
/// A foreign `Origin`, or a name that somebody has made point here (DNS rebinding).
fn check_origin(server: &Server, headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST);
    if let (Some(known), Some(host)) = (&server.hosts, host) {
        let authority = host.parse::<Authority>().ok();
        let name = authority.as_ref().map_or(host, |host| host.host());
        let address = name.trim_start_matches('[').trim_end_matches(']');
        let own = name == "localhost" || address.parse::<IpAddr>().is_ok();
        if !own && !known.iter().any(|known| known == name) {
            let said = format!(
                "host {name} is not this server's: start it with --allow-host {name} if it is"
            );
            return Err(ApiError::status(StatusCode::FORBIDDEN, said));
        }
    }
    if let Some(origin) = text(header::ORIGIN) {
        let site = origin.parse::<Uri>().ok();
        let site = site.as_ref().and_then(Uri::authority);
        let same = site.is_some() && site.map(Authority::as_str) == host;
        let named = |known: &String| known == origin || known == "*";
        if !same && !server.origins.iter().any(named) {
            let said = format!(
                "pages of {origin} may not ask: start the server with --cors-origin {origin} if they may"
            );
            return Err(ApiError::status(StatusCode::FORBIDDEN, said));
        }
    }
    Ok(())
}
