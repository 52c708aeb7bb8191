//! (to be written: hubmqtt)
