//! The pages: a chat at `/`, training runs at `/runs`. Each is one file of HTML, CSS and JavaScript that asks nothing of any other
//! site; what they show comes from the interface that everybody has, and from `runs.rs`.

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::routing::{MethodRouter, get};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};

mod runs;
pub use runs::runs;

const CHAT: &str = include_str!("chat.html");
const RUNS: &str = include_str!("runs.html");

/// The files themselves; a key is asked for by what they call.
pub fn pages<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", page(CHAT))
        .route("/runs", page(RUNS))
}

fn page<S: Clone + Send + Sync + 'static>(html: &'static str) -> MethodRouter<S> {
    let policy = policy(html);
    get(move || {
        let headers = [
            (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
            (CONTENT_SECURITY_POLICY, policy.clone()),
            (X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
            (REFERRER_POLICY, "no-referrer".to_owned()),
            (CACHE_CONTROL, "no-cache".to_owned()),
        ];
        async move { (headers, html) }
    })
}

/// Nothing runs and nothing is drawn but the page's own script and style, and text never becomes markup.
fn policy(html: &str) -> String {
    let hash = |element: &str| {
        let hash = Sha256::digest(inside(html, element));
        format!("'sha256-{}'", BASE64_STANDARD.encode(hash))
    };
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        hash("script"),
        hash("style")
    )
}

/// What stands in the page's only element of this name.
fn inside<'a>(html: &'a str, element: &str) -> &'a str {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let rest = html.split_once(&open).map_or("", |(_, rest)| rest);
    rest.split_once(&close).map_or("", |(inside, _)| inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_whole_and_take_nothing_from_elsewhere() {
        for html in [CHAT, RUNS] {
            for element in ["script", "style"] {
                assert_eq!(html.matches(&format!("<{element}")).count(), 1);
                assert!(inside(html, element).len() > 1000);
            }
            // What the policy would stop anyway, and what is drawn by none of these.
            let svg = "http://www.w3.org/2000/svg";
            let own = html.replace(svg, "");
            for other in [
                "http:",
                "https:",
                "//cdn",
                "innerHTML",
                " style=",
                " onclick=",
            ] {
                assert!(!own.contains(other), "{other}");
            }
        }
    }

    #[test]
    fn the_policy_names_the_script() {
        // sha256 of "a", as a browser's message gives it.
        let said = policy("<style>b</style><script>a</script>");
        assert!(
            said.contains("script-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='"),
            "{said}"
        );
    }
}
