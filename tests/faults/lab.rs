//! Four hosts on one machine: a hub, a device behind a NAT, a service, and the router between them.
//!
//! Owns the network namespaces, and `netbox` on the hub's line if its source is beside the repository. Does not know
//! what runs in them. Invariant: everything is gone when the lab is dropped.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

/// The hub's address.
pub(crate) const HUB: &str = "10.77.1.2";
/// The addresses between which the device and the service change.
const DEVICE: [&str; 2] = ["10.77.3.2", "10.77.3.3"];
const SERVICE: [&str; 2] = ["10.77.2.2", "10.77.2.3"];
/// Where `netbox` is, seen from the repository.
const NETBOX: &str = "../shared/tools/netbox";
/// Empties the connection table of a namespace by ctnetlink (IPCTNL_MSG_CT_DELETE without a key): what `conntrack -F`
/// does, which is rarely installed.
const FORGET: &str = "import socket,struct as s\nk=socket.socket(16,3,12);k.bind((0,0))\n\
    k.send(s.pack('=IHHIIBBH',20,0x102,5,1,0,2,0,0))\nr=k.recv(4096);e=s.unpack('=i',r[16:20])[0]\nassert e==0,e";

/// Which host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// Runs the hub.
    Hub,
    /// Runs the device daemon and its targets.
    Device,
    /// Runs the service daemon and the people's programs.
    Service,
    /// Joins them; masquerades the device.
    Router,
}

/// The hosts.
pub(crate) struct Lab {
    name: String,
    /// For files of this run; kept if the test fails.
    pub(crate) dir: PathBuf,
    netbox: Option<Child>,
    /// Which of its addresses the device has, and the service.
    at: [usize; 2],
    ports: u16,
}

impl Lab {
    /// Builds the network; `None`, with a word of explanation, where that is not possible.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let dir = std::env::temp_dir().join(format!("culvert-faults-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let name = format!("cf{}{}", std::process::id() % 100_000, &name[..1]);
        let mut lab = Self { name, dir, netbox: None, at: [0; 2], ports: 20_000 };
        let can = run(Command::new("ip").args(["netns", "add", &lab.netns(Host::Router)]));
        if !can.status.success() {
            eprintln!("SKIPPED: no network namespaces here: {}", String::from_utf8_lossy(&can.stderr));
            return None;
        }
        lab.build();
        Some(lab)
    }

    fn build(&mut self) {
        for host in [Host::Hub, Host::Device, Host::Service] {
            self.ip(&["netns", "add", &self.netns(host)]);
        }
        for (host, net, address) in [(Host::Hub, 1, HUB), (Host::Service, 2, SERVICE[0]), (Host::Device, 3, DEVICE[0])]
        {
            let (ns, router, up) = (self.netns(host), self.netns(Host::Router), format!("to{net}"));
            self.ip(&["link", "add", "eth0", "netns", &ns, "type", "veth", "peer", "name", &up, "netns", &router]);
            if host != Host::Hub || self.netbox_program().is_none() {
                self.sh(host, &format!("ip addr add {address}/24 dev eth0; ip link set eth0 up"));
                self.sh(Host::Router, &format!("ip addr add 10.77.{net}.1/24 dev {up}; ip link set {up} up"));
                self.sh(host, &format!("ip route add default via 10.77.{net}.1"));
            }
            self.sh(host, "ip link set lo up");
        }
        if let Some(program) = self.netbox_program() {
            self.start_netbox(&program);
        }
        self.sh(Host::Router, "sysctl -qw net.ipv4.ip_forward=1");
        self.sh(Host::Router, "nft add table ip nat; nft add table ip cut");
        self.sh(Host::Router, "nft 'add chain ip nat post { type nat hook postrouting priority 100; }'");
        self.sh(Host::Router, "nft 'add chain ip cut every { type filter hook forward priority 0; }'");
        self.masquerade();
    }

    fn masquerade(&self) {
        let ports = format!("{}-{}", self.ports, self.ports + 999);
        self.sh(Host::Router, "nft flush chain ip nat post");
        let rule = format!("ip saddr 10.77.3.0/24 meta l4proto tcp masquerade to :{ports}");
        self.sh(Host::Router, &format!("nft add rule ip nat post {rule}"));
    }

    /// The program, built from the source beside the repository.
    fn netbox_program(&self) -> Option<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = [root.join(NETBOX), root.join("../../shared/tools/netbox")].into_iter().find(|at| at.exists())?;
        let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("netbox");
        let program = own.join("target/release/netbox");
        if !program.exists() {
            // Its folder may be read-only, and cargo writes a lock file.
            fs::create_dir_all(own.join("src")).unwrap();
            for file in ["Cargo.toml", "src/main.rs"] {
                fs::write(own.join(file), fs::read(source.join(file)).unwrap()).unwrap();
            }
            // A workspace of its own, wherever the target folder lies.
            let manifest = fs::read_to_string(own.join("Cargo.toml")).unwrap() + "\n[workspace]\n";
            fs::write(own.join("Cargo.toml"), manifest).unwrap();
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--release", "--quiet", "--target-dir"]).arg(own.join("target"));
            let built = run(build.current_dir(&own).env_remove("RUSTFLAGS"));
            assert!(built.status.success(), "netbox: {}", String::from_utf8_lossy(&built.stderr));
        }
        Some(program)
    }

    /// The hub's line is netbox's: both legs cross it.
    fn start_netbox(&mut self, program: &Path) {
        let (router, hub) = (self.netns(Host::Router), self.netns(Host::Hub));
        let mut command = Command::new(program);
        command.args([&router, "10.77.1.1/24", &hub, &format!("{HUB}/24")]).arg(self.dir.join("netbox.sock"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        self.netbox = Some(child);
        self.sh(Host::Hub, "ip route add default via 10.77.1.1");
    }

    /// True if lines can be made bad.
    pub(crate) fn has_netbox(&self) -> bool {
        self.netbox.is_some()
    }

    /// Changes the hub's line, both directions: `delay=25 jitter=5 loss=1`. All other figures become zero.
    pub(crate) fn line(&self, figures: &str) {
        if self.netbox.is_some() {
            let all = "both delay=0 jitter=0 loss=0 dup=0 reorder=0 corrupt=0 rate=0 hole=0 queue=0";
            let mut socket = UnixStream::connect(self.dir.join("netbox.sock")).unwrap();
            writeln!(socket, "{all} {figures}").unwrap();
            socket.shutdown(std::net::Shutdown::Write).unwrap();
            // It answers when the line has changed.
            BufReader::new(socket).lines().for_each(drop);
        }
    }

    /// Drops every packet of a host's leg, without a word.
    pub(crate) fn silence(&self, host: Host) {
        let net = if host == Host::Device { 3 } else { 2 };
        let rule = |word| format!("nft add rule ip cut every ip {word} 10.77.{net}.0/24 drop");
        self.sh(Host::Router, &format!("{}; {}", rule("saddr"), rule("daddr")));
    }

    /// Lets packets pass again.
    pub(crate) fn heal(&self) {
        self.sh(Host::Router, "nft flush chain ip cut every");
    }

    /// The NAT forgets its mappings, and will not make the same ones again.
    pub(crate) fn forget_mappings(&mut self) {
        self.ports = if self.ports > 50_000 { 20_000 } else { self.ports + 1000 };
        self.masquerade();
        let forgot = run(self.on(Host::Router, "python3").args(["-c", FORGET]));
        assert!(forgot.status.success(), "{}", String::from_utf8_lossy(&forgot.stderr));
    }

    /// The device or the service moves to another address; the old one is gone.
    pub(crate) fn move_host(&mut self, host: Host) {
        let (at, addresses, net) = match host {
            Host::Device => (&mut self.at[0], DEVICE, 3),
            _ => (&mut self.at[1], SERVICE, 2),
        };
        let old = addresses[*at];
        *at = 1 - *at;
        let new = addresses[*at];
        self.sh(host, &format!("ip addr del {old}/24 dev eth0; ip addr add {new}/24 dev eth0"));
        self.sh(host, &format!("ip route replace default via 10.77.{net}.1"));
    }

    /// Kills the sockets of a host to or from the hub.
    pub(crate) fn kill_sockets(&self, host: Host) {
        let filter = if host == Host::Hub { "( sport = :443 )" } else { "( dport = :443 )" };
        self.sh(host, &format!("ss -tK state established '{filter}'"));
    }

    /// A command on a host.
    pub(crate) fn on(&self, host: Host, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns(host), program]).stdin(Stdio::null());
        command
    }

    /// A line for the shell on a host, which must succeed.
    pub(crate) fn sh(&self, host: Host, line: &str) -> String {
        let output = run(self.on(host, "sh").args(["-c", line]));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{host:?}: {line}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn ip(&self, words: &[&str]) {
        let output = run(Command::new("ip").args(words));
        assert!(output.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn netns(&self, host: Host) -> String {
        format!("{}{host:?}", self.name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut netbox) = self.netbox.take() {
            let _ = netbox.kill();
            let _ = netbox.wait();
        }
        for host in [Host::Hub, Host::Device, Host::Service, Host::Router] {
            // Whatever a program left behind on that host.
            let ns = self.netns(host);
            let left = run(Command::new("ip").args(["netns", "pids", &ns]));
            for process in String::from_utf8_lossy(&left.stdout).split_whitespace() {
                run(Command::new("kill").args(["-9", process]));
            }
            run(Command::new("ip").args(["netns", "del", &ns]));
        }
        if std::thread::panicking() {
            eprintln!("what the daemons said is kept in {}", self.dir.display());
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}
