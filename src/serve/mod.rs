//! `zebroid serve`: models behind HTTP, as OpenAI's clients speak it.
//!
//! | file | holds |
//! |---|---|
//! | `openai/` | the interface: what a request may say, how answers are written |
//! | `page/` | the pages in a browser |
//! | `worker.rs` | the thread that a model computes in |
//! | `models.rs` | models by name, loaded and let go of |
//! | `guard.rs`, `keys.rs` | who may ask |
//! | `listen.rs` | connections |
//! | `metrics.rs` | what Prometheus is told |
//! | `sessions.rs` | conversations in files |
//! | `state.rs` | what all requests share |

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::{Error, Result};

mod error;
mod guard;
mod keys;
mod listen;
mod metrics;
mod models;
mod openai;
mod page;
mod sessions;
mod state;
#[cfg(test)]
mod tests;
mod worker;
pub use keys::Keys;
pub use models::{About, Load, Models};
pub use state::{Limits, Options};

use error::{ApiError, apart};
use sessions::{NO_SESSIONS, Sessions, Turn};
use state::{Client, Server};

/// Whether a body is a request to some path, as far as it tells by itself.
///
/// # Errors
/// What a client would be told.
pub fn check_body(body: &[u8]) -> Result<()> {
    openai::check(body).map_err(|e| Error::invalid(e.message))
}

/// Threads for what is done [`apart`]. The allocator and the tokenizer keep more than a MiB for each: with tokio's 512 a server of a tiny
/// model held 300 MiB for 200 clients, a tenth of it in its cache (docs/results.md, 12).
const APART: usize = 16;

/// Serves until Ctrl-C or SIGTERM; `started` is told the address once the first model is ready.
///
/// # Errors
/// A place that cannot be listened on, files that cannot be used, or a first model that cannot be loaded.
pub fn run(models: Models, options: Options, started: impl FnOnce(&str)) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The models have the processor; these only carry.
        .worker_threads(2)
        .max_blocking_threads(APART)
        .enable_all()
        .build()
        .map_err(|e| Error::invalid(format!("the server cannot be started: {e}")))?;
    let grace = options.limits.grace;
    let served = runtime.block_on(serve(models, options, started));
    // Not for a model that is being loaded.
    runtime.shutdown_timeout(grace);
    served
}

async fn serve(models: Models, options: Options, started: impl FnOnce(&str)) -> Result<()> {
    let tls = options
        .tls
        .as_ref()
        .map(|(chain, key)| listen::tls(chain, key))
        .transpose()?;
    let address = options.address;
    let listener = TcpListener::bind(address).await;
    let listener =
        listener.map_err(|e| Error::invalid(format!("cannot listen on {address}: {e}")))?;
    let address = listener.local_addr().unwrap_or(address);
    let server = Arc::new(Server::new(models, options)?);
    // What is wrong with the first model is said at once.
    server
        .models
        .get(None)
        .await
        .map_err(|e| Error::invalid(e.message))?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    started(&format!("{scheme}://{address}"));
    let closing = async {
        interrupted().await;
        server.closing.store(true, Ordering::Relaxed);
        tracing::info!("stopping: answers under way have {:?}", server.limits.grace);
        tokio::spawn(async {
            interrupted().await;
            std::process::exit(130);
        });
    };
    let stop = || {
        let loaded = server.models.all().filter_map(|(_, model)| model);
        loaded.for_each(|model| model.worker.stop_all());
    };
    let router = router(server.clone());
    listen::serve(listener, tls, router, &server.limits, closing, stop).await;
    Ok(())
}

/// Ctrl-C, or what a service manager sends.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

fn router(server: Arc<Server>) -> Router {
    let keyed = openai::router()
        .route("/metrics", get(metrics))
        .route("/api/models", get(status))
        .route("/v1/sessions", get(sessions))
        .route("/v1/sessions/{name}", get(session).delete(forget))
        .merge(page::runs(server.runs.clone()))
        .route_layer(from_fn_with_state(server.clone(), guard::key));
    let open = Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .merge(page::pages());
    let cors = CorsLayer::new()
        .allow_origin(match server.origins.iter().any(|origin| origin == "*") {
            true => AllowOrigin::any(),
            false => {
                let origins = server
                    .origins
                    .iter()
                    .filter_map(|o| HeaderValue::from_str(o).ok());
                AllowOrigin::list(origins)
            }
        })
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request());
    keyed
        .merge(open)
        .fallback(|request| async {
            let said = "there is no such path here";
            guard::refuse(request, ApiError::status(StatusCode::NOT_FOUND, said)).await
        })
        .method_not_allowed_fallback(|request| async {
            let said = "this path knows other methods";
            guard::refuse(
                request,
                ApiError::status(StatusCode::METHOD_NOT_ALLOWED, said),
            )
            .await
        })
        .layer(cors)
        .layer(from_fn_with_state(server.clone(), guard::origin))
        .layer(from_fn_with_state(server.clone(), guard::watch))
        .with_state(server)
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Whether requests are taken: the first model was loaded before they could come.
async fn ready(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    match server.is_closing() {
        false => Ok(Json(json!({"status": "ready"}))),
        true => Err(ApiError::busy("the server is being stopped")),
    }
}

async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], server.metrics.text())
}

async fn status(State(server): State<Arc<Server>>) -> Json<Value> {
    let models = server.status().into_iter().map(|(name, status)| {
        let mut of = serde_json::to_value(status.unwrap_or_default()).unwrap_or_default();
        of["loaded"] = status.is_some().into();
        (name.to_owned(), of)
    });
    Json(json!({"models": models.collect::<serde_json::Map<_, _>>()}))
}

/// Of which model; the first where none is named.
#[derive(Debug, Deserialize)]
struct Of {
    model: Option<String>,
}

impl Of {
    /// The sessions of the server, and the model's name.
    fn sessions<'s>(&'s self, server: &'s Server) -> Result<(&'s Sessions, &'s str), ApiError> {
        let sessions = server.sessions.as_ref();
        let sessions =
            sessions.ok_or_else(|| ApiError::status(StatusCode::NOT_FOUND, NO_SESSIONS))?;
        let first = || {
            server
                .models
                .all()
                .next()
                .map_or("", |(about, _)| &about.name)
        };
        Ok((sessions, self.model.as_deref().unwrap_or_else(first)))
    }

    /// One of them, when nobody is at it.
    async fn turn<'s>(
        &'s self,
        server: &'s Server,
        client: &Client,
        name: &str,
    ) -> Result<(Turn, &'s str), ApiError> {
        let (sessions, model) = self.sessions(server)?;
        let turn = sessions.turn(client.key.as_deref(), model, name).await?;
        Ok((turn, model))
    }
}

fn no_session(name: &str) -> ApiError {
    ApiError::status(StatusCode::NOT_FOUND, format!("no session {name}"))
}

async fn sessions(
    State(server): State<Arc<Server>>,
    Extension(client): Extension<Client>,
    Query(of): Query<Of>,
) -> Result<Json<Value>, ApiError> {
    let (sessions, model) = of.sessions(&server)?;
    let names = sessions.names(client.key.as_deref(), model);
    Ok(Json(
        json!({"object": "list", "model": model, "data": names}),
    ))
}

/// What was said in a session.
async fn session(
    State(server): State<Arc<Server>>,
    Extension(client): Extension<Client>,
    Path(name): Path<String>,
    Query(of): Query<Of>,
) -> Result<Json<Value>, ApiError> {
    let (turn, model) = of.turn(&server, &client, &name).await?;
    if !turn.exists() {
        return Err(no_session(&name));
    }
    let read = move || turn.messages().map_err(|e| ApiError::field("session", e));
    let messages = apart(read).await?;
    Ok(Json(
        json!({"name": name, "model": model, "messages": messages}),
    ))
}

async fn forget(
    State(server): State<Arc<Server>>,
    Extension(client): Extension<Client>,
    Path(name): Path<String>,
    Query(of): Query<Of>,
) -> Result<Json<Value>, ApiError> {
    // After what is being answered, which would bring it back.
    let (turn, _) = of.turn(&server, &client, &name).await?;
    match turn.remove()? {
        true => Ok(Json(json!({"name": name, "deleted": true}))),
        false => Err(no_session(&name)),
    }
}
