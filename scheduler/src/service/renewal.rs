//! Gives another key and certificate to who has one.

use std::{sync::Arc, time::Duration};

use hextet_api::v1::{ConfirmRequest, ConfirmResponse, RenewRequest, RenewResponse, renewal_server::Renewal};
use scheduler_core::{
    event::{Enrolled, Event, Renew},
    time::WallTime,
    token::Role,
    transition::Origin,
};
use tonic::{Request, Response, Status};

use super::{enrollment::not_signed, status};
use crate::{
    auth, claim,
    hub::Hub,
    identity::Identity,
    pki::{Signed, SigningRequest},
    rotation,
};

/// How long a key that was replaced is remembered at least.
const REMEMBERED_MIN: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) struct RenewalService(pub(crate) Arc<Hub>);

#[tonic::async_trait]
impl Renewal for RenewalService {
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let caller = auth::caller(&request);
        let (holder, old, ends) = certificate(&caller)?;
        let request = request.into_inner();
        if holder.role == Role::Node {
            claim::check(&self.0, &holder.name, &request.machine)?;
        }
        let signing = SigningRequest::parse(&request.csr_der)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let now = self.0.clock.wall();
        let new = signing.key.clone();
        let renew = Renew {
            holder: holder.clone(),
            old: old.to_owned(),
            new,
            ends: ends.max(now + REMEMBERED_MIN),
            takes_ca: request.takes_ca,
        };
        self.0.write(origin(&caller), Event::Renew(renew)).await.map_err(status)?;
        let state = self.0.state();
        // The CA that is written down with the key: another may make certificates by now.
        let ca = state.renewals().get(old).and_then(|renewal| renewal.ca.as_deref());
        let signed =
            self.0.pki.sign(signing, holder, ca.or(rotation::first(&state)), now).map_err(not_signed)?;
        let Signed { certificate_der, ca_der } = signed;
        Ok(Response::new(RenewResponse { certificate_der, ca_der }))
    }

    async fn confirm(&self, request: Request<ConfirmRequest>) -> Result<Response<ConfirmResponse>, Status> {
        let caller = auth::caller(&request);
        let (holder, key, _) = certificate(&caller)?;
        let event = Event::KeyUsed(holder.clone(), key.to_owned());
        self.0.write(origin(&caller), event).await.map_err(status)?;
        Ok(Response::new(ConfirmResponse {}))
    }
}

fn origin(caller: &Identity) -> Origin {
    Origin { changer: caller.changer(), message: String::new() }
}

fn certificate(caller: &Identity) -> Result<(&Enrolled, &str, WallTime), Status> {
    match caller {
        Identity::Enrolled { enrolled, key, ends } => Ok((enrolled, key, *ends)),
        _ => Err(Status::failed_precondition("the Unix socket has no certificate to be replaced")),
    }
}
