//! nginx with a folder to download from and to upload to.

use std::{fs, net::TcpStream, path::PathBuf, process::Command};

use crate::support::{Process, Scratch, eventually, port::free_port};

/// A running nginx.
pub struct Nginx {
    _process: Process,
    port: u16,
    scratch: Scratch,
}

impl Nginx {
    #[track_caller]
    pub fn start() -> Self {
        let (scratch, port) = (Scratch::new(), free_port());
        fs::create_dir(scratch.join("www")).unwrap();
        scratch.write("www/hello.txt", "hello from the far side\n");
        let folder = scratch.path().display();
        let user = super::sshd::user();
        let user = if user == "root" { "user root;" } else { "" };
        let text = format!(
            "daemon off; master_process on; worker_processes 1; {user}\n\
             pid {folder}/nginx.pid; error_log {folder}/error.log;\n\
             events {{ worker_connections 2048; }}\n\
             http {{\n  access_log off; sendfile on; keepalive_requests 1000000;\n\
             client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n\
             uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
             server {{\n    listen 127.0.0.1:{port} backlog=1024; root {folder}/www;\n\
             client_max_body_size 0; dav_methods PUT; create_full_put_path on;\n  }}\n}}\n"
        );
        let config = scratch.write("nginx.conf", text);
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-p").arg(scratch.path()).arg("-e").arg(scratch.join("error.log")).arg("-c").arg(config);
        let process = Process::start("nginx", &mut command);
        eventually("nginx to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
        Self { _process: process, port, scratch }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A file that it serves, or stores.
    pub fn file(&self, name: &str) -> PathBuf {
        self.scratch.join("www").join(name)
    }
}

impl Drop for Nginx {
    /// The master is killed with its process; its worker would outlive it.
    fn drop(&mut self) {
        if let Ok(id) = fs::read_to_string(self.scratch.join("nginx.pid")) {
            let _ = Command::new("kill").args(["-TERM", id.trim()]).status();
            let gone = || (!fs::exists(format!("/proc/{}", id.trim())).unwrap_or(false)).then_some(());
            if !std::thread::panicking() {
                // Gone, or a zombie that the process's drop collects.
                let zombie = || {
                    let status = fs::read_to_string(format!("/proc/{}/stat", id.trim())).unwrap_or_default();
                    status.contains(") Z").then_some(())
                };
                eventually("nginx to end", || gone().or_else(zombie));
            }
        }
    }
}
