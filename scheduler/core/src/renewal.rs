//! A key that is being replaced by another, or has been, or whose node was deleted.
//!
//! The new key is good from the moment at which it is written down, and the old one until the new one was used for the
//! first time: whoever is stopped in between has one that works, and afterwards there is one.

use serde::{Deserialize, Serialize};

use crate::time::WallTime;

/// The most that are kept at a time.
pub const RENEWALS_MAX: usize = 20_000;

/// The most of one holder, so that nobody uses up the room of the others.
pub const RENEWALS_OF_HOLDER_MAX: usize = 32;

/// The most keys of deleted nodes that are remembered; beyond, those that were deleted first are forgotten. A machine with
/// a key that is forgotten is one that was never known here, and keeps its pods.
pub const DELETED_MAX: usize = 1_000;

/// That a key, by which it is stored, makes way for another. Keys are the SHA-256 of public keys, in hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Whose keys these are, as certificates name them.
    pub holder: String,
    /// The key that takes the place.
    pub new: String,
    /// The new key was used: the old one is not good any more.
    pub confirmed: bool,
    /// The CA that made the certificate for the new key; none for the one with which the cluster began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// When the certificate of the old key ends, and this need not be known any more.
    pub ends: WallTime,
    /// When somebody deleted the node whose key this is, and `new` with it. No key is ever given again, so that this stays
    /// true whatever backup a server is put back from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<WallTime>,
}
