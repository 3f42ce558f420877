//! Turns a token into a certificate. The only service that answers a caller without one.

use std::{sync::Arc, time::Duration};

use hextet_address::{GroupId, NodePrefix, SubnetId};
use hextet_api::v1::{EnrollRequest, EnrollResponse, Ipv6Prefix, enrollment_server::Enrollment};
use ipnetwork::Ipv6Network;
use scheduler_core::{
    event::{Claim, Enroll, Enrolled, Event, PrefixChoice},
    time::WallTime,
    token::{Role, Token, TokenError},
    transition::Origin,
};
use tonic::{Request, Response, Status};

use super::status;
use crate::{
    hub::Hub,
    pki::{PkiError, Signed, SigningRequest, sha256_hex},
    writer::chain,
};

/// How far the caller's clock may be off.
const CLOCK_OFF_MAX: Duration = Duration::from_secs(600);
/// Prefixes of one uplink that are looked at.
const UPLINK_PREFIXES_MAX: usize = 64;

pub(crate) struct EnrollmentService(pub(crate) Arc<Hub>);

#[tonic::async_trait]
impl Enrollment for EnrollmentService {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        let id = sha256_hex(&request.secret);
        let token = self.token(&id)?;
        self.check_clock(WallTime(request.client_unix_ms))?;
        let signing = SigningRequest::parse(&request.csr_der)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        check_key(&request.machine_key, &signing.key)?;
        let event = Enroll {
            token: id.clone(),
            name: Some(request.name.clone()).filter(|name| !name.is_empty()),
            key: signing.key.clone(),
            node: if token.role == Role::Node { Some(claim(&request)?) } else { None },
        };
        let changer = format!("token:{}", &id[..8]);
        let origin = Origin { changer, message: String::new() };
        self.0.write(origin, Event::Enroll(event)).await.map_err(status)?;
        self.respond(&id, signing).map(Response::new)
    }
}

impl EnrollmentService {
    /// A first look, so that a caller without a good secret learns nothing else.
    fn token(&self, id: &str) -> Result<Arc<Token>, Status> {
        let token = self.0.state().tokens().get(id).cloned();
        token.ok_or_else(|| Status::permission_denied(TokenError::Unknown.to_string()))
    }

    fn check_clock(&self, theirs: WallTime) -> Result<(), Status> {
        let ours = self.0.clock.wall();
        if theirs.distance(ours) <= CLOCK_OFF_MAX {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "the clocks differ: it is {theirs} there and {ours} at the server; set the one that is wrong and try again"
        )))
    }

    fn respond(&self, token: &str, signing: SigningRequest) -> Result<EnrollResponse, Status> {
        let state = self.0.state();
        let cluster = self.0.cluster.as_deref();
        let used =
            state.tokens().get(token).ok_or_else(|| Status::aborted("the token has just become too old"))?;
        let name = used.name.clone().unwrap_or_default();
        let enrolled = Enrolled { role: used.role.clone(), name: name.clone() };
        let issuing = state.authorities().map(|authorities| authorities.issuing.as_str());
        let signed = self.0.pki.sign(signing, &enrolled, issuing, self.0.clock.wall()).map_err(not_signed)?;
        let Signed { certificate_der, ca_der } = signed;
        let node = state.nodes().get(&name).filter(|_| enrolled.role == Role::Node);
        Ok(EnrollResponse {
            certificate_der,
            ca_der,
            epoch: self.0.store.epoch().to_owned(),
            cluster_prefix: cluster.map(|cluster| cluster.prefix.network().into()),
            pod_ipv4: cluster.map(|cluster| cluster.pod_ipv4.into()),
            node_prefix: node.map(|node| node.prefix.network().into()),
            name,
        })
    }
}

pub(super) fn not_signed(error: PkiError) -> Status {
    match error {
        PkiError::Replaced => Status::aborted(error.to_string()),
        error => Status::internal(chain(&error)),
    }
}

/// The request itself proves the key; a caller that names another one is confused.
fn claim(request: &EnrollRequest) -> Result<Claim, Status> {
    let subnet =
        u16::try_from(request.subnet_id).map_err(|_| Status::invalid_argument("a subnet ID has 16 bits"))?;
    let group_id =
        GroupId::new(request.group_id).map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(Claim { prefix: prefix_choice(request)?, subnet: SubnetId(subnet), group_id })
}

fn prefix_choice(request: &EnrollRequest) -> Result<PrefixChoice, Status> {
    if request.uplink_prefixes.len() > UPLINK_PREFIXES_MAX {
        return Err(Status::invalid_argument(format!(
            "an uplink has at most {UPLINK_PREFIXES_MAX} prefixes"
        )));
    }
    if let Some(prefix) = &request.pod_prefix {
        return Ok(PrefixChoice::Lan(node_prefix("pod_prefix", prefix)?));
    }
    let prefixes = request.uplink_prefixes.iter().map(|prefix| node_prefix("uplink_prefixes", prefix));
    match prefixes.collect::<Result<Vec<_>, _>>()? {
        none if none.is_empty() => Ok(PrefixChoice::Own),
        prefixes => Ok(PrefixChoice::OfUplink(prefixes)),
    }
}

fn node_prefix(field: &str, prefix: &Ipv6Prefix) -> Result<NodePrefix, Status> {
    let wrong = |error: &dyn std::error::Error| Status::invalid_argument(format!("{field}: {error}"));
    let network = Ipv6Network::try_from(prefix).map_err(|error| wrong(&error))?;
    NodePrefix::new(network).map_err(|error| wrong(&error))
}

fn check_key(named: &[u8], proved: &str) -> Result<(), Status> {
    let named: String = named.iter().map(|byte| format!("{byte:02x}")).collect();
    if named.is_empty() || named == proved {
        Ok(())
    } else {
        Err(Status::invalid_argument("machine_key is not the SHA-256 of the public key in the request"))
    }
}
