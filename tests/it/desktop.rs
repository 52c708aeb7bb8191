//! RDP through the tunnel: a login that starts a session on the far side.

use crate::{
    programs::xrdp::{Desktop, User, Xrdp, can_log_in},
    support::World,
};

#[test]
fn rdp_logs_in() {
    if !can_log_in() {
        return;
    }
    let (xrdp, user) = (Xrdp::start(), User::add());
    let world = World::plan().target("rdp", xrdp.address()).start();
    assert_eq!(user.session(), None);
    let mut desktop = Desktop::log_in(world.forward("rdp"), &user);
    let display = desktop.wait_for_session(&user);
    println!("{} has a session on display {display}", user.name);
    assert_eq!(world.service.metric("culvert_forward_flows", &[("forward", "rdp")]), 1.0);
    assert!(desktop.is_open());
}
