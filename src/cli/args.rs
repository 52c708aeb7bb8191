//! The command line: what can be said, and what `--help` says about it.
//!
//! Owns the names of commands and options. Does not know what they do.
//! Invariant: no option takes a secret; secrets come from files, because every user can read argv.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::base::{Identity, Name, Span};

/// Reach devices behind NAT and firewalls over TCP, by device ID.
///
/// Exit codes: 0 done, 64 wrong usage, 69 something needed is unavailable, 70 a bug, 78 wrong configuration.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Try everything on this machine: hub, device and service in one process, on loopback.
    ///
    /// Makes a CA, a registry and all configuration in a folder, starts a demo web server as a target (and offers
    /// the local sshd, if there is one), prints what to try, and runs until it is interrupted.
    Quickstart(QuickstartArgs),
    /// Run the hub: devices and services meet here.
    ///
    /// `culvert hub init` makes its configuration, keys and certificate.
    #[command(args_conflicts_with_subcommands = true)]
    Hub(HubArgs),
    /// Run the device daemon: offers local targets to those whom its rules admit.
    Device(DaemonArgs),
    /// Run the service daemon: listens on local ports and forwards to targets behind devices.
    Service(DaemonArgs),
    /// Manage device identities, through the hub's REST API.
    Registry(RegistryArgs),
    /// Join standard input and output to a target behind a device.
    ///
    /// As a ProxyCommand: ssh -o ProxyCommand='culvert connect %n ssh' pump-17
    ///
    /// Goes through the running `culvert service` if there is one, else by a device stream of its own.
    Connect(ConnectArgs),
    /// Check configuration files without starting anything.
    ///
    /// Prints one line per problem, as file:line: key: reason. If a daemon runs with the file, prints what a
    /// reload would change.
    Check(CheckArgs),
    /// The hub's DeviceStreams records: who opened what, when, with which result.
    Logs(LogsArgs),
    /// The hub's streaming endpoints.
    #[command(name = "devicestream")]
    DeviceStream(DeviceStreamArgs),
    /// Write man pages or shell completions, for packagers.
    #[command(hide = true)]
    Gen(GenArgs),
}

/// Options of `quickstart`.
#[derive(Debug, Args)]
pub struct QuickstartArgs {
    /// Keep everything in this folder; without it a temporary one is used.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Options of a daemon.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Options of `hub`.
#[derive(Debug, Args)]
pub struct HubArgs {
    /// Without a subcommand the hub runs.
    #[command(subcommand)]
    pub action: Option<HubAction>,
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Subcommands of `hub`.
#[derive(Debug, Subcommand)]
pub enum HubAction {
    /// Make a hub's configuration, keys, CA and certificate; print the service connection string.
    Init(InitArgs),
}

/// Options of `hub init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The folder to write into; made if it is missing.
    #[arg(long, value_name = "DIR", default_value = "/etc/culvert")]
    pub dir: PathBuf,
    /// The name (or address) under which clients reach the hub.
    #[arg(long, value_name = "NAME", required_unless_present = "renew")]
    pub hostname: Option<String>,
    /// More names or addresses for the certificate.
    #[arg(long, value_name = "NAME")]
    pub also: Vec<String>,
    /// Where HTTPS is served.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:443")]
    pub listen: std::net::SocketAddr,
    /// Where MQTT over TLS is served, or "off".
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8883")]
    pub mqtt_listen: String,
    /// Use this certificate chain (PEM) and make no CA.
    #[arg(long, value_name = "FILE", requires = "private_key", conflicts_with = "also")]
    pub certificate: Option<PathBuf>,
    /// The private key of the given certificate (PEM).
    #[arg(long, value_name = "FILE", requires = "certificate")]
    pub private_key: Option<PathBuf>,
    /// Only make a new certificate with the CA that is in the folder; a running hub takes it up by itself.
    #[arg(long, conflicts_with_all = ["hostname", "also", "listen", "mqtt_listen", "certificate", "private_key"])]
    pub renew: bool,
}

/// How to reach a hub's REST API.
#[derive(Debug, Clone, Args)]
pub struct HubAccess {
    /// A file with a policy's connection string.
    ///
    /// Default: owner.connection as `hub init` wrote it, in /etc/culvert or the user's configuration folder.
    #[arg(long, value_name = "FILE", env = "CULVERT_CONNECTION_STRING_FILE", global = true)]
    pub connection_string_file: Option<PathBuf>,
    /// The CA that signed the hub's certificate (PEM).
    ///
    /// Default: ca.pem beside the connection string's file if it exists, else the machine's CAs.
    #[arg(long, value_name = "FILE", env = "CULVERT_CA_FILE", global = true)]
    pub ca_file: Option<PathBuf>,
}

/// Options of `registry`.
#[derive(Debug, Args)]
pub struct RegistryArgs {
    /// Which hub.
    #[command(flatten)]
    pub hub: HubAccess,
    /// What to do.
    #[command(subcommand)]
    pub action: RegistryAction,
}

/// Subcommands of `registry`. A DEVICE is a device ID, or DEVICE/MODULE for a module.
#[derive(Debug, Subcommand)]
pub enum RegistryAction {
    /// Register a device (or DEVICE/MODULE) and print its connection string.
    Add {
        /// The device.
        device: Identity,
        /// It proves itself with a client certificate of this SHA-256 or SHA-1 thumbprint, instead of a key.
        #[arg(long, value_name = "HEX")]
        thumbprint: Option<String>,
        /// A second certificate, for rotation.
        #[arg(long, value_name = "HEX", requires = "thumbprint")]
        secondary_thumbprint: Option<String>,
        /// It proves itself with a client certificate that the hub's device CA signed.
        #[arg(long, conflicts_with = "thumbprint")]
        ca_signed: bool,
    },
    /// List the devices, or one device's modules.
    List {
        /// List this device's modules.
        #[arg(long, value_name = "DEVICE")]
        modules_of: Option<crate::base::DeviceId>,
        /// As JSON, keys left out.
        #[arg(long)]
        json: bool,
    },
    /// Show one device as JSON, its keys left out.
    Show {
        /// The device.
        device: Identity,
        /// Print its connection string, with its key, instead.
        #[arg(long)]
        connection_string: bool,
    },
    /// Remove a device. Its session and device streams end within seconds.
    Remove {
        /// The device.
        device: Identity,
    },
    /// Give a device a new key and print its new connection string.
    ///
    /// The key in use moves to the secondary place, so that the device works until it has the new one. What the
    /// old secondary key admitted ends.
    Rotate {
        /// The device.
        device: Identity,
        /// Replace both keys: the old ones are worthless at once.
        #[arg(long)]
        both: bool,
    },
    /// Let a disabled device in again.
    Enable {
        /// The device.
        device: Identity,
    },
    /// Keep a device out without forgetting it. Its session and device streams end within seconds.
    Disable {
        /// The device.
        device: Identity,
        /// Why, for people.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
}

/// Options of `connect`.
#[derive(Debug, Args)]
pub struct ConnectArgs {
    /// The device (or DEVICE/MODULE).
    pub device: Identity,
    /// The target's name at the device.
    pub target: Name,
    /// The service daemon's configuration: its control socket is used, or else its connection string.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The files.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Whose files they are, if neither their names nor their contents tell.
    #[arg(long)]
    pub role: Option<Role>,
}

/// A daemon's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// The hub.
    Hub,
    /// The device daemon.
    Device,
    /// The service daemon.
    Service,
}

impl Role {
    /// The role as it stands in paths and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hub => "hub",
            Self::Device => "device",
            Self::Service => "service",
        }
    }
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Only this device's.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<crate::base::DeviceId>,
    /// Only the last so long, such as 1h or 2d.
    #[arg(long, value_name = "SPAN")]
    pub since: Option<Span>,
    /// The records as they are, one JSON object per line.
    #[arg(long)]
    pub json: bool,
    /// The hub's configuration, which names the log's file.
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub config: Option<PathBuf>,
    /// The log's file itself; rotated ones beside it are read too.
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// Options of `devicestream`.
#[derive(Debug, Args)]
pub struct DeviceStreamArgs {
    /// Which hub.
    #[command(flatten)]
    pub hub: HubAccess,
    /// What to do.
    #[command(subcommand)]
    pub action: DeviceStreamAction,
}

/// Subcommands of `devicestream`.
#[derive(Debug, Subcommand)]
pub enum DeviceStreamAction {
    /// Print the streaming endpoints as JSON, as the cloud's own command line does.
    Show,
}

/// Options of `gen`.
#[derive(Debug, Args)]
pub struct GenArgs {
    /// What to write.
    pub what: Generated,
    /// The folder to write into; made if it is missing.
    pub dir: PathBuf,
}

/// What `gen` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Generated {
    /// A man page for each command.
    Man,
    /// Completions for bash, zsh and fish.
    Completions,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_spellings_parse() {
        for line in [
            "quickstart --dir /tmp/q",
            "hub init --dir /tmp/h --hostname hub.example.com",
            "hub init --dir /tmp/h --renew",
            "hub --config /etc/culvert/hub.toml",
            "hub",
            "device --config d.toml",
            "service --config s.toml",
            "registry add pump-17",
            "registry add pump-17/flow --thumbprint AA",
            "registry list --connection-string-file f --json",
            "registry rotate pump-17 --both",
            "connect pump-17 ssh",
            "check a.toml b.toml --role hub",
            "logs --device pump-17 --since 1h --json",
            "devicestream show",
            "gen man out",
        ] {
            let words = std::iter::once("culvert").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in ["connect ../x ssh", "connect pump-17 a/b", "hub init", "logs --since 5", "hub --config x init"] {
            let words = std::iter::once("culvert").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
