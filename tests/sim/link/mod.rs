//! The simulation of the link: two cores, carriers that are cut anywhere, a virtual clock.
