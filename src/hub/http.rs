//! Requests to a hub: the token goes nowhere else, what is busy or cut off is asked again, and what is refused is told apart from what
//! cannot be asked.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Error;
use crate::watch::Watch;

/// Of one request, the first included.
pub(super) const ATTEMPTS: u32 = 4;
const REDIRECTS: usize = 10;
/// Longest pause that a hub can ask for.
const LONGEST: Duration = Duration::from_secs(60);

pub(super) type Response = ureq::http::Response<ureq::Body>;

/// Why there is no answer, or not the one asked for.
pub(super) enum Failure {
    /// No connection, or a hub that is busy: another time it may go.
    Unreachable(String),
    /// It has answered.
    Refused {
        status: u16,
        /// The hub's own word for it.
        code: String,
        message: String,
    },
    Interrupted,
    /// What is on this side.
    Here(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Here(error)
    }
}

/// What is asked for.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub url: &'a str,
    /// The headers alone, and not those of another host.
    pub head: bool,
    /// First byte.
    pub from: u64,
    pub patience: Patience,
}

/// When a hub is asked again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// Never: what is kept will do.
    None,
    /// When it is busy, but not when it cannot be reached: what it is asked for may be no more than a mistyped path.
    Short,
    /// When it cannot be reached, too: it was there a moment ago.
    Long,
}

impl Patience {
    /// With the first question about a repository.
    pub fn first(is_kept: bool) -> Self {
        match is_kept {
            true => Self::None,
            false => Self::Short,
        }
    }
}

pub(super) struct Client {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<String>,
    /// Before the second attempt; doubled before each further one.
    pause: Duration,
}

impl Client {
    pub fn new(endpoint: &str, token: Option<&str>, pause: Duration) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // They are followed here, where it is known whom the token is for.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(Duration::from_secs(10)))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_per_read(Some(Duration::from_secs(30)))
            .user_agent(concat!("zebroid/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Self {
            agent,
            endpoint: endpoint.to_owned(),
            token: token.map(str::to_owned),
            pause,
        }
    }

    /// The answer, once there is one.
    pub fn send(&self, ask: Ask, watch: &dyn Watch) -> Result<Response, Failure> {
        let mut attempt = 1;
        loop {
            let (why, wait) = match self.follow(ask) {
                Ok(response) => match response.status().as_u16() {
                    408 | 429 | 500.. => {
                        let why = format!("it answers {}", response.status());
                        let seconds = header(&response, "retry-after").and_then(|s| s.parse().ok());
                        (why, seconds.map(Duration::from_secs))
                    }
                    200..300 => return Ok(response),
                    300..400 if ask.head => return Ok(response),
                    // Nothing stands there; whoever asks knows how long the file is.
                    416 if ask.from > 0 => return Ok(response),
                    status => {
                        let word = |name| header(&response, name).unwrap_or_default().to_owned();
                        return Err(Failure::Refused {
                            status,
                            code: word("x-error-code"),
                            message: word("x-error-message"),
                        });
                    }
                },
                Err(error) if ask.patience != Patience::Long => {
                    return Err(Failure::Unreachable(error.to_string()));
                }
                Err(error) => (error.to_string(), None),
            };
            if attempt >= ATTEMPTS || ask.patience == Patience::None {
                return Err(Failure::Unreachable(why));
            }
            tracing::info!("{}: {why}; asking again", ask.url);
            self.wait(attempt, wait, watch)?;
            attempt += 1;
        }
    }

    /// A pause before another attempt, as long as the hub asks for or longer each time.
    pub fn wait(
        &self,
        attempt: u32,
        asked: Option<Duration>,
        watch: &dyn Watch,
    ) -> Result<(), Failure> {
        let until = Instant::now()
            + asked
                .unwrap_or(self.pause * 2u32.pow(attempt - 1))
                .min(LONGEST);
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if watch.stop() {
                return Err(Failure::Interrupted);
            }
            sleep(left.min(Duration::from_millis(100)));
        }
        Ok(())
    }

    fn follow(&self, ask: Ask) -> Result<Response, ureq::Error> {
        let mut url = ask.url.to_owned();
        for _ in 0..REDIRECTS {
            let response = self.once(&url, ask)?;
            let target =
                header(&response, "location").filter(|_| response.status().is_redirection());
            match target {
                // Another host's headers are not the hub's.
                Some(target) if !(ask.head && target.contains("://")) => {
                    url = joined(&url, target);
                }
                _ => return Ok(response),
            }
        }
        Err(ureq::Error::TooManyRedirects)
    }

    fn once(&self, url: &str, ask: Ask) -> Result<Response, ureq::Error> {
        let request = match ask.head {
            true => self.agent.head(url),
            false => self.agent.get(url),
        };
        // Sizes are of the files, and not of what they were packed into.
        let mut request = request.header("accept-encoding", "identity");
        if let Some(token) = self
            .token
            .as_ref()
            .filter(|_| origin(url) == origin(&self.endpoint))
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if ask.from > 0 {
            request = request.header("range", format!("bytes={}-", ask.from));
        }
        request.call()
    }
}

pub(super) fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']);
    &url[..end.map_or(url.len(), |at| start + at)]
}

/// Where a redirect from `url` leads.
fn joined(url: &str, target: &str) -> String {
    match target {
        _ if target.contains("://") => target.to_owned(),
        _ if target.starts_with("//") => {
            let scheme = url.split("//").next().unwrap_or_default();
            format!("{scheme}{target}")
        }
        _ if target.starts_with('/') => format!("{}{target}", origin(url)),
        _ => {
            let folder = url.rfind('/').map_or(url, |at| &url[..at]);
            format!("{folder}/{target}")
        }
    }
}

/// A part of an address, with what means something there escaped; `kept` stays.
pub(super) fn escaped(text: &str, kept: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        match c.is_ascii_alphanumeric() || "-._~".contains(c) || kept.contains(c) {
            true => escaped.push(c),
            false => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_joined() {
        let url = "https://hub.co:8443/org/name/resolve/main/a.json?x=/";
        assert_eq!(origin(url), "https://hub.co:8443");
        assert_eq!(origin("http://hub"), "http://hub");
        assert_eq!(joined(url, "/b"), "https://hub.co:8443/b");
        assert_eq!(joined(url, "//cdn.co/b"), "https://cdn.co/b");
        assert_eq!(joined(url, "http://cdn.co/b"), "http://cdn.co/b");
        assert_eq!(joined("http://hub/a/b", "c"), "http://hub/a/c");
        assert_eq!(escaped("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(escaped("in/a b#é", "/"), "in/a%20b%23%C3%A9");
    }
}
