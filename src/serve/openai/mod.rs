//! OpenAI's interface.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::error::ApiError;
use super::models::{About, Defaults};
use super::state::Server;

mod answer;
mod chat;
mod completions;
mod fields;
mod responses;

pub fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/responses", post(responses::create))
}

/// What is wrong with a body by itself, whichever it is meant for.
///
/// # Errors
/// The first field that cannot be read or is out of range.
pub fn check(body: &[u8]) -> Result<(), ApiError> {
    let body = fields::Body::of(body);
    let common: fields::Common = body.read()?;
    common.choices()?;
    common.params(&Defaults::default(), usize::MAX)?;
    let kinds = [
        body.read::<chat::Fields>().map(drop),
        body.read::<completions::Fields>().map(drop),
        body.read::<responses::Fields>().map(drop),
    ];
    kinds
        .into_iter()
        .min_by_key(Result::is_err)
        .unwrap_or(Ok(()))
}

fn described(about: &About, loaded: bool) -> Value {
    json!({
        "id": about.name, "object": "model", "created": about.created, "owned_by": "zebroid",
        "context_length": about.context, "chat": about.template.is_some(), "loaded": loaded,
    })
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    let all = server.models.all();
    let all: Vec<Value> = all
        .map(|(about, model)| described(about, model.is_some()))
        .collect();
    Json(json!({"object": "list", "data": all}))
}

async fn model(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (about, loaded) = server.models.about(&name)?;
    Ok(Json(described(about, loaded)))
}

/// Seconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
