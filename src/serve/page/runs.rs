//! Training runs below a folder, as JSON: `/api/runs` lists them, `/api/runs/FOLDER` says all of one.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Path as At, Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::serve::error::{ApiError, apart};
use crate::train::runs::{Curve, Run, list};

type Folder = Arc<Option<PathBuf>>;

/// `None`: the server was told of no folder, and says so.
pub fn runs<S>(folder: Option<PathBuf>) -> Router<S> {
    Router::new()
        .route("/api/runs", get(all))
        .route("/api/runs/{*folder}", get(one))
        .with_state(Arc::new(folder))
}

async fn all(State(folder): State<Folder>) -> Result<Json<Value>, ApiError> {
    let read = move || {
        let root = root(&folder)?;
        let mut runs = list(&root).map_err(ApiError::bug)?;
        runs.iter_mut().for_each(|run| tell_no_place(run, &root));
        Ok(json!({ "runs": runs }))
    };
    apart(read).await.map(Json)
}

/// What of a run's curve is asked for.
#[derive(Deserialize)]
struct Asked {
    /// By a name of `metrics.jsonl`; those of several values as NAME/INDEX.
    #[serde(default = "loss")]
    metric: String,
    /// Only steps after this one.
    #[serde(default)]
    since: u64,
}

fn loss() -> String {
    "loss".to_owned()
}

#[derive(Serialize)]
struct Layer {
    mixer: &'static str,
    /// Its sizes, in words.
    sizes: String,
}

async fn one(
    State(folder): State<Folder>,
    At(name): At<String>,
    Query(asked): Query<Asked>,
) -> Result<Json<Value>, ApiError> {
    let read = move || {
        let root = root(&folder)?;
        let nothing = || ApiError::status(StatusCode::NOT_FOUND, format!("no run {name} here"));
        let folder = find(&root, &name).ok_or_else(nothing)?;
        // It may have ended just now.
        let failed = |error: Error| match folder.exists() {
            true => ApiError::bug(error),
            false => nothing(),
        };
        let mut run = Run::open(&folder).map_err(failed)?;
        // Beside a folder that is none itself; nobody has looked where that leads.
        if run.folder != folder {
            return Err(nothing());
        }
        let settings = run.settings().map_err(failed)?;
        let figures = run.figures().map_err(failed)?;
        let samples = run.samples().map_err(failed)?;
        let curve = run.curve(&asked.metric, asked.since);
        let Curve { names, points } = curve.map_err(failed)?;
        // A bank has several plans, a run on the way none yet.
        let config = Checkpoint::config_only(&run.folder).ok();
        let layers = config.iter().flat_map(|(config, _)| &config.layers);
        let layers = layers.map(|mixer| Layer {
            mixer: mixer.name(),
            sizes: mixer.show(),
        });
        let layers: Vec<Layer> = layers.collect();
        tell_no_place(&mut run, &root);
        Ok(json!({
            "run": run, "settings": settings, "figures": figures, "layers": layers, "samples": samples,
            "metric": asked.metric, "metrics": names, "points": points,
        }))
    };
    apart(read).await.map(Json)
}

/// Where runs are looked for, without links.
fn root(folder: &Option<PathBuf>) -> Result<PathBuf, ApiError> {
    let missing = |said: String| ApiError::status(StatusCode::NOT_FOUND, said);
    let Some(folder) = folder else {
        let said = "this server shows no runs: start it with --runs FOLDER";
        return Err(missing(said.to_owned()));
    };
    fs::canonicalize(folder).map_err(|e| missing(format!("--runs {}: {e}", folder.display())))
}

/// A run's folder is told as [`find`] takes it.
fn tell_no_place(run: &mut Run, root: &Path) {
    let above = format!("{}/", root.display());
    run.error = run.error.take().map(|said| said.replace(&above, ""));
    let inside = run.folder.strip_prefix(root).unwrap_or(&run.folder);
    run.folder = match (inside.as_os_str().is_empty(), root.file_name()) {
        (true, Some(name)) => name.into(),
        _ => inside.to_owned(),
    };
}

/// The folder of this name below `root`, or `root` if that is its own; `None` if there is none, or if the name or a link leads out.
fn find(root: &Path, name: &str) -> Option<PathBuf> {
    let name = Path::new(name);
    let plain = name
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let inside = root.join(name);
    let own = root.file_name() == Some(name.as_os_str()) && !inside.exists();
    let folder = match (plain, own) {
        (false, _) => return None,
        (true, true) => root.to_owned(),
        (true, false) => fs::canonicalize(inside).ok()?,
    };
    folder.starts_with(root).then_some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out() {
        let folder = tempfile::tempdir().unwrap();
        let all = fs::canonicalize(folder.path()).unwrap();
        let root = all.join("runs");
        for run in ["runs/a/kd.partial", "secret"] {
            fs::create_dir_all(all.join(run)).unwrap();
        }
        assert_eq!(find(&root, "a/kd.partial"), Some(root.join("a/kd.partial")));
        assert_eq!(find(&root, "runs").as_ref(), Some(&root));
        #[cfg(unix)]
        std::os::unix::fs::symlink(all.join("secret"), root.join("link")).unwrap();
        let absolute = all.join("secret");
        for name in [
            "../secret",
            "a/../../secret",
            "..",
            ".",
            "link",
            "nothing",
            absolute.to_str().unwrap(),
        ] {
            assert_eq!(find(&root, name), None, "{name}");
        }
    }
}
