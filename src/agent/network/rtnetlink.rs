//! Which messages of rtnetlink(7) tell of a change.
//!
//! Owns the addresses that were announced. Does not know sockets. Invariant: what is not understood counts as a change;
//! what is told again, or concerns no path to a hub, does not.

use std::collections::HashMap;

/// Addresses that are remembered; a host with more gets notice of each refresh.
const MAX_ADDRESSES: usize = 1024;
/// The loopback interface is the first one of each network namespace.
const LOOPBACK: u32 = 1;
/// Heads: of a message, of an address in it, of a route, of an attribute of these.
const HEAD: usize = 16;
const ADDRESS_HEAD: usize = 8;
const ROUTE_HEAD: usize = 12;
const ATTRIBUTE_HEAD: usize = 4;
/// Kinds of message.
const NEW_ADDRESS: u16 = 20;
const DEL_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
/// `RT_SCOPE_LINK`, and what is narrower: such an address reaches no hub.
const SCOPE_LINK: u8 = 253;
/// `RTN_UNICAST`: an ordinary route.
const UNICAST: u8 = 1;
/// `RTN_LOCAL` to `RTN_MULTICAST`: routes that come and go with an address, which is announced itself.
const OF_ADDRESSES: std::ops::RangeInclusive<u8> = 2..=5;
/// `IFA_ADDRESS`, `IFA_LOCAL`, `RTA_OIF`.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const OUT_INTERFACE: u16 = 4;

/// The addresses that were announced, with their flags: on which interface, of which family and length.
#[derive(Debug, Default)]
pub(super) struct Addresses(HashMap<(u32, u8, u8, Vec<u8>), u8>);

impl Addresses {
    /// Notes what a datagram says; true if any of its messages tells of a change.
    pub(super) fn learn(&mut self, mut datagram: &[u8]) -> bool {
        let mut is_change = datagram.is_empty();
        while !datagram.is_empty() {
            let Some((kind, body, rest)) = split_message(datagram) else { return true };
            is_change |= self.learn_message(kind, body).unwrap_or(true);
            datagram = rest;
        }
        is_change
    }

    /// Messages were lost: nothing is known for certain.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    /// `None`: the message is not understood.
    fn learn_message(&mut self, kind: u16, body: &[u8]) -> Option<bool> {
        match kind {
            NEW_ADDRESS | DEL_ADDRESS => {
                let (head, attributes) = body.split_first_chunk::<ADDRESS_HEAD>()?;
                let [family, length, flags, scope, interface @ ..] = *head;
                let interface = u32::from_ne_bytes(interface);
                let address = attribute(attributes, LOCAL).or_else(|| attribute(attributes, ADDRESS))?;
                let key = (interface, family, length, address.to_vec());
                if kind == DEL_ADDRESS {
                    // It may be one that a connection used, or the sign that its interface is down.
                    self.0.remove(&key);
                    return Some(true);
                }
                Some(interface != LOOPBACK && scope < SCOPE_LINK && self.learn_address(key, flags))
            }
            NEW_ROUTE | DEL_ROUTE => {
                let (head, attributes) = body.split_first_chunk::<ROUTE_HEAD>()?;
                let kind = head[7];
                let to = attribute(attributes, OUT_INTERFACE).and_then(|bytes| bytes.try_into().ok());
                let is_loopback = kind == UNICAST && to.map(u32::from_ne_bytes) == Some(LOOPBACK);
                Some(!is_loopback && !OF_ADDRESSES.contains(&kind))
            }
            _ => None,
        }
    }

    /// True if it was not announced before, or not like that.
    fn learn_address(&mut self, key: (u32, u8, u8, Vec<u8>), flags: u8) -> bool {
        let is_new = self.0.get(&key) != Some(&flags);
        if self.0.len() < MAX_ADDRESSES || self.0.contains_key(&key) {
            self.0.insert(key, flags);
        }
        is_new
    }
}

/// The first message of a datagram: its kind and body; and what comes behind it.
fn split_message(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
    let body = datagram.get(HEAD..length)?;
    Some((kind, body, datagram.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The value of the first attribute of that kind.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        let value = attributes.get(ATTRIBUTE_HEAD..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GLOBAL: u8 = 0;
    const TENTATIVE: u8 = 0x40;

    fn message(kind: u16, head: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = head.to_vec();
        for (kind, value) in attributes {
            body.extend(((ATTRIBUTE_HEAD + value.len()) as u16).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut all = ((HEAD + body.len()) as u32).to_ne_bytes().to_vec();
        all.extend(kind.to_ne_bytes());
        all.resize(HEAD, 0);
        all.extend(body);
        all
    }

    fn address(kind: u16, interface: u32, last: u8, flags: u8, scope: u8) -> Vec<u8> {
        let mut head = vec![2, 24, flags, scope];
        head.extend(interface.to_ne_bytes());
        message(kind, &head, &[(ADDRESS, &[10, 0, 0, last]), (LOCAL, &[10, 0, 0, last]), (3, b"eth0\0")])
    }

    fn route(kind: u8, interface: u32) -> Vec<u8> {
        let head = [2, 24, 0, 0, 254, 2, 253, kind, 0, 0, 0, 0];
        message(NEW_ROUTE, &head, &[(ADDRESS, &[10, 0, 0, 0]), (OUT_INTERFACE, &interface.to_ne_bytes())])
    }

    #[test]
    fn an_address_is_news_once() {
        let mut known = Addresses::default();
        assert!(known.learn(&address(NEW_ADDRESS, 2, 1, TENTATIVE, GLOBAL)));
        assert!(known.learn(&address(NEW_ADDRESS, 2, 1, 0, GLOBAL)), "it can be used now");
        assert!(!known.learn(&address(NEW_ADDRESS, 2, 1, 0, GLOBAL)), "a refresh");
        assert!(known.learn(&address(NEW_ADDRESS, 3, 1, 0, GLOBAL)), "on another interface");
        assert!(known.learn(&address(DEL_ADDRESS, 2, 1, 0, GLOBAL)));
        assert!(known.learn(&address(NEW_ADDRESS, 2, 1, 0, GLOBAL)));
        known.forget();
        assert!(known.learn(&address(NEW_ADDRESS, 2, 1, 0, GLOBAL)));
    }

    #[test]
    fn what_is_no_way_to_a_hub_is_no_news() {
        let mut known = Addresses::default();
        assert!(!known.learn(&address(NEW_ADDRESS, LOOPBACK, 1, 0, GLOBAL)));
        assert!(!known.learn(&address(NEW_ADDRESS, 2, 1, 0, SCOPE_LINK)));
        assert!(known.learn(&address(DEL_ADDRESS, LOOPBACK, 1, 0, GLOBAL)), "a connection may have used it");
        assert!(known.learn(&address(DEL_ADDRESS, 2, 1, 0, SCOPE_LINK)), "the interface may be down");
        assert!(!known.learn(&route(UNICAST, LOOPBACK)));
        assert!(known.learn(&route(7, LOOPBACK)), "unreachable");
        assert!(known.learn(&route(UNICAST, 2)));
        assert!(!known.learn(&route(2, 2)), "comes with its address");
        let both = [address(NEW_ADDRESS, LOOPBACK, 1, 0, GLOBAL), address(NEW_ADDRESS, 2, 1, 0, GLOBAL)];
        assert!(known.learn(&both.concat()));
    }

    #[test]
    fn what_is_not_understood_is_news() {
        let mut known = Addresses::default();
        let whole = address(NEW_ADDRESS, LOOPBACK, 1, 0, GLOBAL);
        assert!((0..whole.len()).all(|length| known.learn(&whole[..length])));
        assert!(known.learn(&message(99, &[], &[])));
        assert!(known.learn(&message(NEW_ADDRESS, &[2, 24, 0, 0, 1, 0, 0, 0], &[])), "without an address");
    }

    #[test]
    fn addresses_are_remembered_up_to_a_limit() {
        let mut known = Addresses::default();
        for interface in 2..2 * MAX_ADDRESSES as u32 {
            assert!(known.learn(&address(NEW_ADDRESS, interface, 1, 0, GLOBAL)));
        }
        assert_eq!(known.0.len(), MAX_ADDRESSES);
    }
}
