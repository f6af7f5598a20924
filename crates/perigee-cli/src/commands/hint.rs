//! The request that `up` prints to be pasted into another terminal: with this program's name as it can be typed there, and a
//! prompt that the model has something to say to.

use std::path::Path;

/// A prompt in the style of the text that the demo model has read; it knows nothing else.
const DEMO_PROMPT: &str = "And God said";
const OTHER_PROMPT: &str = "Hello";

/// `PROGRAM generate ...` for a router, with what clients need to reach it.
pub(crate) fn request(model: &str, router: &str, client_options: &str) -> String {
    let typed = std::env::args_os().next();
    let typed = typed.as_deref().map(Path::new).and_then(Path::to_str);
    let file = std::env::current_exe().ok();
    let program = program(typed, file.as_deref().and_then(Path::to_str));
    let prompt = if model == perigee_demo::NAME { DEMO_PROMPT } else { OTHER_PROMPT };
    format!("{program} generate --router {router}{client_options} --prompt \"{prompt}\" --max-tokens 32")
}

/// How this program is called from another terminal: by its name where it was found by that, else by its file, since the other
/// terminal may be in another directory and `cargo run` puts nothing on the path.
fn program(typed: Option<&str>, file: Option<&str>) -> String {
    let name = typed.filter(|typed| !typed.is_empty() && !typed.contains('/'));
    let name = name.or(file).or(typed).unwrap_or("perigee");
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-+".contains(letter);
    if name.chars().all(is_plain) { name.to_owned() } else { format!("'{}'", name.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_called_as_the_shell_finds_it() {
        assert_eq!(program(Some("perigee"), Some("/usr/bin/perigee")), "perigee");
        assert_eq!(
            program(Some("target/release/perigee"), Some("/src/target/release/perigee")),
            "/src/target/release/perigee"
        );
        assert_eq!(program(Some("./perigee"), None), "./perigee");
        assert_eq!(program(None, Some("/a b/it's")), r"'/a b/it'\''s'");
        assert_eq!(program(Some(""), Some("/p")), "/p");
        assert_eq!(program(None, None), "perigee");
    }

    #[test]
    fn the_demo_model_is_asked_what_it_has_read() {
        assert!(
            request("demo", "127.0.0.1:1", "")
                .ends_with("generate --router 127.0.0.1:1 --prompt \"And God said\" --max-tokens 32")
        );
        assert!(
            request("random:tiny", "127.0.0.1:1", " --tls-ca A").contains("127.0.0.1:1 --tls-ca A --prompt \"Hello\"")
        );
    }
}
