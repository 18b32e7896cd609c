//! Options that commands share.

pub mod cache;
pub mod data;
pub mod device;
pub mod engine;
pub mod hub;
pub mod init;
pub mod memory;
pub mod sampling;
