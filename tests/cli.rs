//! The program and its unit files, from outside.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use clap::Parser as _;
use culvert::cli::args::Cli;

const PROGRAM: &str = env!("CARGO_BIN_EXE_culvert");
/// For anything that a daemon does on the same machine, on a slow one.
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder of this test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("culvert-cli-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn culvert(words: &[&str]) -> Output {
    Command::new(PROGRAM).args(words).stdin(Stdio::null()).output().unwrap()
}

fn code_and_words(output: &Output) -> (i32, String) {
    (output.status.code().unwrap(), String::from_utf8(output.stderr.clone()).unwrap())
}

#[test]
fn exit_codes_tell_whose_fault_it_is() {
    let folder = Folder::new("codes");
    assert!(culvert(&["--help"]).status.success());
    assert_eq!(code_and_words(&culvert(&["frobnicate"])).0, 64);
    assert_eq!(code_and_words(&culvert(&["connect", "a/b/c", "ssh"])).0, 64);

    fs::write(folder.0.join("service.toml"), "connection_string_fle = \"x\"\n").unwrap();
    let file = folder.file("service.toml");
    for words in
        [["check", &file].as_slice(), &["service", "--config", &file], &["connect", "d", "t", "--config", &file]]
    {
        let (code, said) = code_and_words(&culvert(words));
        assert_eq!(code, 78, "{words:?}: {said}");
        assert!(said.contains(&format!("{file}:1: connection_string_fle")), "{said}");
    }

    let nowhere = "HostName=127.0.0.1:1;SharedAccessKeyName=iothubowner;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==";
    fs::write(folder.0.join("owner.connection"), nowhere).unwrap();
    let owner = folder.file("owner.connection");
    let (code, said) = code_and_words(&culvert(&["registry", "list", "--connection-string-file", &owner]));
    assert_eq!(code, 69, "{said}");
    assert!(!said.contains("MDEyMzQ1"), "a key is told: {said}");
}

#[test]
fn a_new_hub_gets_only_names_that_it_can_be_called_by() {
    let folder = Folder::new("names");
    let dir = folder.file("hub");
    let init = |words: &[&str]| code_and_words(&culvert(&[&["hub", "init", "--dir", &dir], words].concat()));
    for (words, said) in [
        (["--hostname", "1.2.3"].as_slice(), "\"1.2.3\" is not a host name"),
        (&["--hostname", "hub.test", "--also", "bad name"], "--also \"bad name\""),
        (&["--hostname", "hub.test", "--also", "ünï"], "--also \"ünï\""),
        (&["--hostname", "hub.test", "--also", "[::1]"], "--also \"[::1]\""),
        (&["--renew", "--also", "hub.test"], "--also"),
        (&["--renew", "--listen", "127.0.0.1:1"], "--listen"),
    ] {
        let (code, words) = init(words);
        assert_eq!(code, 64, "{words}");
        assert!(words.contains(said), "{words}");
        assert!(!Path::new(&dir).exists(), "{words}");
    }
    let names = ["--hostname", "hub.test", "--also", "::1", "--also", "*.hub.test", "--also", "my_hub"];
    assert_eq!(init(&names), (0, String::new()));
}

#[test]
fn what_cannot_be_written_is_a_failure_and_no_panic() {
    let folder = Folder::new("say");
    let made = culvert(&["hub", "init", "--hostname", "hub.test", "--dir", &folder.file("hub")]);
    assert!(made.status.success());
    let file = folder.file("hub/hub.toml");
    let check = |stdout: Stdio, stderr: Stdio| {
        let mut check = Command::new(PROGRAM);
        check.args(["check", &file]).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        check.spawn().unwrap().wait().unwrap().code()
    };
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    assert_eq!(check(closed(), Stdio::null()), Some(0), "as with `| head`");
    assert_eq!(check(full(), Stdio::null()), Some(69));
    assert_eq!(check(full(), closed()), Some(69));
    // A connection string is told once.
    let mut init = Command::new(PROGRAM);
    init.args(["hub", "init", "--hostname", "hub.test", "--dir", &folder.file("other")]).stdout(full());
    let (code, said) = code_and_words(&init.output().unwrap());
    assert!(code == 69 && said.contains("the service connection string could not be written"), "{code}: {said}");
}

#[test]
fn a_state_that_cannot_be_kept_is_no_mistake_in_the_file() {
    let folder = Folder::new("state");
    let key = "HostName=127.0.0.1:1;DeviceId=d;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==";
    fs::write(folder.0.join("device.connection"), key).unwrap();
    let config = |more: &str| {
        let connection = folder.file("device.connection");
        let (state, socket) = (folder.file("state"), folder.file("device.sock"));
        let text =
            format!("connection_string_file = {connection:?}\nstate_dir = {state:?}\ncontrol_socket = {socket:?}\n");
        fs::write(folder.0.join("device.toml"), format!("{text}[metrics]\nlisten = \"off\"\n{more}")).unwrap();
        folder.file("device.toml")
    };
    // The instance ID's file cannot be read: a folder has its name.
    fs::create_dir_all(folder.0.join("state/instance-id")).unwrap();
    let (code, said) = code_and_words(&culvert(&["device", "--config", &config("")]));
    assert_eq!(code, 69, "{said}");
    // Nor can the journal be reached, where there is none.
    if !Path::new("/run/systemd/journal/socket").exists() {
        let (code, said) = code_and_words(&culvert(&["device", "--config", &config("[log]\nformat = \"journald\"\n")]));
        assert_eq!(code, 69, "{said}");
        assert!(said.contains("the journal cannot be reached"), "{said}");
    }
}

/// As in a container or on a machine with a service daemon of somebody else's.
#[test]
fn a_socket_of_others_does_not_keep_connect_from_going_another_way() {
    use std::os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::CommandExt as _,
    };
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("not root: nobody else to be");
        return;
    }
    let folder = Folder::new("others");
    // The program must be somewhere where that other user may go.
    fs::copy(PROGRAM, folder.0.join("culvert")).unwrap();
    fs::create_dir_all(folder.0.join("run/culvert")).unwrap();
    fs::set_permissions(folder.0.join("run/culvert"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::create_dir_all(folder.0.join("config/culvert")).unwrap();
    let connect = || {
        let mut connect = Command::new(folder.0.join("culvert"));
        connect.args(["connect", "d", "t"]).stdin(Stdio::null()).uid(65534).gid(65534);
        connect.env("HOME", &folder.0).env("XDG_RUNTIME_DIR", folder.0.join("run"));
        code_and_words(&connect.env("XDG_CONFIG_HOME", folder.0.join("config")).output().unwrap())
    };
    let file = folder.0.join("config/culvert/service.toml");
    // Nothing else can be tried: the socket is what the user should hear of.
    fs::write(&file, "connection_string_file = \"absent\"\n").unwrap();
    let (code, said) = connect();
    assert!(code == 69 && said.contains("may be used only by its owner and group"), "{code}: {said}");
    // Its own way fails, too, but it was gone, as far as the certificates.
    fs::write(file.with_file_name("ca.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let key = "HostName=127.0.0.1:1;SharedAccessKeyName=service;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==";
    fs::write(file.with_file_name("service.connection"), key).unwrap();
    fs::write(&file, "connection_string_file = \"service.connection\"\nca_file = \"ca.pem\"\n").unwrap();
    let (code, said) = connect();
    assert!(code != 0 && !said.contains("may be used only"), "{code}: {said}");
}

/// A hub as systemd would start it, and what it tells systemd.
struct Notified {
    hub: Child,
    socket: UnixDatagram,
    log: PathBuf,
}

impl Notified {
    fn start(folder: &Folder) -> Self {
        let path = folder.0.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let log = folder.0.join("log");
        let hub = Command::new(PROGRAM)
            .args(["hub", "--config", &folder.file("hub.toml")])
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "9000000")
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { hub, socket, log }
    }

    /// The next message that holds all of these; the daemon's log if none comes.
    fn wait_for(&self, wanted: &[&str]) -> String {
        let mut buffer = [0; 4096];
        loop {
            let Ok(length) = self.socket.recv(&mut buffer) else {
                panic!("{wanted:?} did not come:\n{}", fs::read_to_string(&self.log).unwrap());
            };
            let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
            if wanted.iter().all(|part| message.contains(part)) {
                return message;
            }
        }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.hub.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Notified {
    fn drop(&mut self) {
        let _ = self.hub.kill();
        let _ = self.hub.wait();
    }
}

#[test]
fn systemd_is_told_of_the_start_each_reload_the_turning_loops_and_the_end() {
    let folder = Folder::new("notify");
    let dir = folder.0.display().to_string();
    let init =
        ["hub", "init", "--dir", &dir, "--hostname", "127.0.0.1", "--listen", "127.0.0.1:0", "--mqtt-listen", "off"];
    assert!(culvert(&init).status.success());
    let file = folder.0.join("hub.toml");
    let good = fs::read_to_string(&file).unwrap() + "\n[metrics]\nlisten = \"off\"\n";
    fs::write(&file, &good).unwrap();

    let mut daemon = Notified::start(&folder);
    daemon.wait_for(&["READY=1", "STATUS=ready"]);
    daemon.wait_for(&["WATCHDOG=1"]);
    daemon.signal("-HUP");
    daemon.wait_for(&["RELOADING=1", "MONOTONIC_USEC="]);
    daemon.wait_for(&["READY=1"]);

    // A refused file: the answer comes all the same, the log names the line, and the daemon lives.
    fs::write(&file, good.replace("hostname", "hostnam")).unwrap();
    daemon.signal("-HUP");
    daemon.wait_for(&["RELOADING=1"]);
    daemon.wait_for(&["READY=1"]);
    assert!(fs::read_to_string(&daemon.log).unwrap().contains("hostnam: unknown key"));
    assert!(!culvert(&["check", &folder.file("hub.toml")]).status.success());
    fs::write(&file, good.clone() + "\n[log]\nlevel = \"debug\"\n").unwrap();
    daemon.wait_for(&["READY=1"]);
    let plan = culvert(&["check", &folder.file("hub.toml")]);
    assert!(String::from_utf8(plan.stdout).unwrap().contains("just this configuration"));

    let second = culvert(&["hub", "--config", &folder.file("hub.toml")]);
    let (code, said) = code_and_words(&second);
    assert!(code == 69 && said.contains("another daemon is running"), "{code}: {said}");

    daemon.signal("-TERM");
    daemon.wait_for(&["STOPPING=1"]);
    assert_eq!(daemon.hub.wait().unwrap().code(), Some(0));
    assert!(!folder.0.join("hub.sock").exists());
}

/// A quickstart in a folder; interrupted at its end.
struct Quickstart(Child);

impl Quickstart {
    /// Waits for what is printed when everything works, and yields it.
    fn start(folder: &Folder) -> (Self, String) {
        let log = fs::File::create(folder.0.join("log")).unwrap();
        let dir = folder.file("demo");
        let mut command = Command::new(PROGRAM);
        let child = command.args(["quickstart", "--dir", &dir]).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut quickstart = Self(child);
        let lines = BufReader::new(quickstart.0.stdout.take().unwrap()).lines();
        let mut said = String::new();
        for line in lines {
            said += &(line.unwrap() + "\n");
            if said.contains("Ctrl-C") {
                return (quickstart, said);
            }
        }
        panic!("quickstart ended:\n{}", fs::read_to_string(folder.0.join("log")).unwrap());
    }
}

impl Drop for Quickstart {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What `culvert connect` answers to a request for the page, its configuration as given.
fn page_by_connect(config: &str) -> String {
    let mut connect = Command::new(PROGRAM)
        .args(["connect", "--config", config, "quickstart-device", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    connect.stdin.take().unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let output = connect.wait_with_output().unwrap();
    assert!(output.status.success(), "{config}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_quickstart_works_as_it_says_takes_up_a_changed_file_and_ends_when_asked() {
    let folder = Folder::new("quickstart");
    let (mut quickstart, said) = Quickstart::start(&folder);
    let url = said.split("curl http://").nth(1).unwrap().split('/').next().unwrap();
    let mut page = String::new();
    let mut socket = TcpStream::connect(url).unwrap();
    socket.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    socket.read_to_string(&mut page).unwrap();
    assert!(page.contains("Hello from a web server behind the device!"), "{page}");

    let config = folder.file("demo/service.toml");
    assert!(page_by_connect(&config).contains("Hello"));
    let text = fs::read_to_string(&config).unwrap();
    // Without the daemon's socket, by a device stream of its own.
    let alone = folder.file("demo/alone-service.toml");
    fs::write(&alone, text.replace("service.sock", "nobody.sock")).unwrap();
    assert!(page_by_connect(&alone).contains("Hello"));

    let added = folder.file("demo/web.sock");
    let rule = format!(
        "\n[[forward]]\nname = \"more\"\nlisten = \"unix:{added}\"\ndevice = \"quickstart-device\"\ntarget = \"web\"\n"
    );
    fs::write(&config, text + &rule).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !Path::new(&added).exists() {
        assert!(Instant::now() < deadline, "{}", fs::read_to_string(folder.0.join("log")).unwrap());
        std::thread::yield_now();
    }

    let listed = culvert(&["registry", "list", "--connection-string-file", &folder.file("demo/owner.connection")]);
    assert!(String::from_utf8(listed.stdout).unwrap().contains("quickstart-device  enabled   Connected"));
    let logs = culvert(&["logs", "--config", &folder.file("demo/hub.toml"), "--device", "quickstart-device"]);
    assert!(String::from_utf8(logs.stdout).unwrap().contains("culvert-mux-1"));

    let interrupted = Command::new("kill").args(["-INT", &quickstart.0.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    assert_eq!(quickstart.0.wait().unwrap().code(), Some(0));
}

fn units() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let files = ["system", "user"].into_iter().flat_map(|kind| fs::read_dir(root.join(kind)).unwrap());
    let units: Vec<PathBuf> = files.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(units.len(), 4);
    units
}

#[test]
fn every_command_in_a_unit_parses() {
    for unit in units() {
        let text = fs::read_to_string(&unit).unwrap();
        let commands =
            text.lines().filter_map(|line| line.strip_prefix("ExecStart=").or(line.strip_prefix("ExecReload=")));
        let own: Vec<&str> = commands.filter(|command| command.starts_with("/usr/bin/culvert ")).collect();
        assert_eq!(own.len(), 2, "{}", unit.display());
        for command in own {
            assert!(Cli::try_parse_from(command.split(' ')).is_ok(), "{}: {command}", unit.display());
        }
    }
}

/// Debian's package `systemd` has the tool.
#[test]
fn systemd_finds_no_fault_with_the_units_and_little_exposure() {
    let folder = Folder::new("units");
    for unit in units() {
        let copy = folder.0.join(unit.file_name().unwrap());
        let text = fs::read_to_string(&unit).unwrap().replace("/usr/bin/culvert", PROGRAM);
        fs::write(&copy, text).unwrap();
        let user = unit.parent().unwrap().ends_with("user");
        let scope = if user { "--user" } else { "--system" };
        let mut verify = Command::new("systemd-analyze");
        verify.args([scope, "--man=no", "verify"]).arg(&copy).env("XDG_RUNTIME_DIR", &folder.0).env("HOME", &folder.0);
        let verified = verify.output().unwrap();
        let said = String::from_utf8(verified.stderr).unwrap();
        assert!(verified.status.success() && said.is_empty(), "{}: {said}", unit.display());
        if user {
            continue;
        }
        let rated = Command::new("systemd-analyze").args(["security", "--offline=true"]).arg(&copy).output().unwrap();
        let table = String::from_utf8(rated.stdout).unwrap();
        let score = table.split("exposure level for").nth(1).and_then(|rest| rest.split(' ').nth(2)).unwrap();
        assert!(score.parse::<f32>().unwrap() <= 2.0, "{}: {score}", unit.display());
    }
}
