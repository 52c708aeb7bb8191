//! No secret in anything that a daemon says: logs at the finest level, metrics, answers, errors, its command line.
//!
//! The secrets are those of a fresh installation; what is made on the fly (tokens, tickets) is recognised by its form.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_culvert");
/// For anything that a daemon does on the same machine, on a slow one that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Daemon {
    child: Child,
    said: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, role: &str) -> Self {
        let said = dir.join(format!("{role}.said"));
        let out = fs::File::create(&said).unwrap();
        let config = dir.join(format!("{role}.toml"));
        let child = Command::new(PROGRAM)
            .args([role, "--config", &config.display().to_string()])
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        Self { child, said }
    }

    /// Its arguments and environment: what `ps` and a crash report show.
    fn face(&self) -> String {
        let read = |what: &str| fs::read(format!("/proc/{}/{what}", self.child.id())).unwrap_or_default();
        String::from_utf8_lossy(&[read("cmdline"), read("environ")].concat()).into_owned()
    }

    fn end(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes an installation: hub, CA, keys, a registered device, the three files.
fn install(dir: &Path) {
    let mut child = Command::new(PROGRAM)
        .args(["quickstart", "--dir", &dir.display().to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let done = lines.any(|line| line.unwrap().contains("Ctrl-C"));
    let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    child.wait().unwrap();
    assert!(done, "quickstart ended by itself");
}

/// What must not be said: every key and every line of a private key, as it is and as URLs write it.
fn secrets(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for file in files_below(dir) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for part in text.split([';', '\n']) {
            if let Some(key) = part.trim().strip_prefix("SharedAccessKey=") {
                found.push(key.to_owned());
            }
        }
        if file.parent().unwrap().ends_with("keys") {
            found.push(text.trim().to_owned());
        }
        if text.contains("PRIVATE KEY-----") {
            found.extend(text.lines().filter(|line| line.len() > 20 && !line.starts_with('-')).map(str::to_owned));
        }
    }
    let encoded = |secret: &String| secret.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    let all: Vec<String> = found.iter().cloned().chain(found.iter().map(encoded)).collect();
    all.into_iter().filter(|secret| secret.len() >= 16).collect()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

/// What was made on the fly: a signature, or a ticket, behind the word that announces it.
fn tokens(said: &str) -> Vec<String> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "-_+/%=".contains(c);
    let announced = ["sig=", "$auth=", "Bearer ", "bearer ", "auth-token: ", "auth-token\":\""];
    let mut found = Vec::new();
    for word in announced {
        for (at, _) in said.match_indices(word) {
            let value: String = said[at + word.len()..].chars().take_while(|c| is_token(*c)).collect();
            if value.len() >= 32 {
                found.push(format!("{word}{}...", &value[..8]));
            }
        }
    }
    found
}

fn get(address: &str, path: &str) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// The value of the first `listen` behind a heading.
fn listen(file: &Path, heading: &str) -> String {
    let text = fs::read_to_string(file).unwrap();
    let section = text.split(heading).nth(1).unwrap();
    section.split("listen = \"").nth(1).unwrap().split('"').next().unwrap().to_owned()
}

fn set_up(dir: &Path, target: &TcpListener) {
    for role in ["hub", "device", "service"] {
        let file = dir.join(format!("{role}.toml"));
        let mut text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains("\n[log]"), "{text}");
        text.push_str("\n[log]\nlevel = \"trace,culvert=trace\"\nformat = \"json\"\n");
        fs::write(&file, text).unwrap();
    }
    // The demo's server is gone; ours is the target.
    let file = dir.join("device.toml");
    let (text, address) = (fs::read_to_string(&file).unwrap(), target.local_addr().unwrap());
    let lines = text.lines().map(|line| match line.starts_with("address = ") {
        true => format!("address = \"{address}\"\n"),
        false => format!("{line}\n"),
    });
    fs::write(&file, lines.collect::<String>()).unwrap();
}

/// A connection through everything, as soon as everything is up.
fn carry(forward: &str, target: &TcpListener) -> bool {
    target.set_nonblocking(false).unwrap();
    let deadline = Instant::now() + PATIENCE;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok((mut socket, _)) = target.accept() {
                let mut byte = [0];
                if socket.read(&mut byte).is_ok_and(|n| n == 1) {
                    return socket.write_all(b"pong").unwrap();
                }
            }
        });
        let mut carried = false;
        while !carried && Instant::now() < deadline {
            let Ok(mut client) = TcpStream::connect(forward) else {
                std::thread::yield_now();
                continue;
            };
            let mut answer = [0; 4];
            carried = client.write_all(b"x").is_ok() && client.read_exact(&mut answer).is_ok();
        }
        if !carried {
            // Ends the thread above.
            let _ = TcpStream::connect(target.local_addr().unwrap()).and_then(|mut own| own.write_all(b"x"));
        }
        carried
    })
}

fn command(words: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(words).stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn nothing_that_is_said_holds_a_secret() {
    let folder = Folder(std::env::temp_dir().join(format!("culvert-secrets-{}", std::process::id())));
    let dir = folder.0.join("demo");
    fs::create_dir_all(&dir).unwrap();
    install(&dir);
    let secrets = secrets(&dir);
    assert!(secrets.len() >= 8, "the installation's secrets were not found");
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    set_up(&dir, &target);

    let mut daemons = ["hub", "device", "service"].map(|role| Daemon::start(&dir, role));
    let carried = carry(&listen(&dir.join("service.toml"), "[[forward]]"), &target);
    let mut said: Vec<(String, String)> = Vec::new();
    for role in ["hub", "device", "service"] {
        let address = listen(&dir.join(format!("{role}.toml")), "[metrics]");
        for path in ["/metrics", "/readyz", "/nothing"] {
            said.push((format!("{role} {path}"), get(&address, path)));
        }
    }
    let path = |name: &str| dir.join(name).display().to_string();
    let wrong =
        fs::read_to_string(dir.join("owner.connection")).unwrap().replace("SharedAccessKey=", "SharedAccessKey=AAAA");
    fs::write(dir.join("wrong.connection"), wrong).unwrap();
    for file in ["owner.connection", "wrong.connection"] {
        for words in
            [["registry", "list"].as_slice(), &["registry", "show", "quickstart-device"], &["registry", "show", "x"]]
        {
            let (file, authority) = (path(file), path("ca.pem"));
            let all = [words, &["--connection-string-file", &file, "--ca-file", &authority]].concat();
            said.push((all.join(" "), command(&all)));
        }
    }
    said.push(("logs".into(), command(&["logs", "--config", &path("hub.toml")])));
    said.extend(daemons.iter().map(|daemon| (format!("ps {}", daemon.child.id()), daemon.face())));
    daemons.iter_mut().for_each(Daemon::end);
    for daemon in &daemons {
        said.push((daemon.said.display().to_string(), fs::read_to_string(&daemon.said).unwrap()));
    }
    let log = &said.last().unwrap().1;
    assert!(carried && log.contains("\"TRACE\""), "no device stream, or not logged finely: {log}");

    for (what, text) in &said {
        for secret in &secrets {
            assert!(!text.contains(secret), "{what} tells a key that begins with {}", &secret[..4]);
        }
        for line in text.lines() {
            let tokens = tokens(line);
            // Who said it is at the end of a line of JSON; the token itself is not repeated.
            let target = line.rsplit("\"target\":").next().unwrap_or_default();
            assert!(tokens.is_empty(), "{what} tells {tokens:?}; target: {:.80}", target);
        }
    }
}

#[test]
fn a_token_would_be_recognised() {
    let ticket = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFG";
    assert_eq!(tokens(&format!("Authorization: Bearer {ticket}")).len(), 1);
    assert_eq!(tokens(&format!("$iothub/streams/POST/x/?$rid=1&$auth={ticket}")).len(), 1);
    assert!(tokens("Bearer [redacted]").is_empty());
}
