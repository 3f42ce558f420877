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

use super::status;
use crate::{auth, claim, hub::Hub, identity::Identity, pki::SigningRequest, writer::chain};

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
        let (old, new) = (old.to_owned(), signing.key.clone());
        let renew = Renew { holder: holder.clone(), old, new, ends: ends.max(now + REMEMBERED_MIN) };
        self.0.write(origin(&caller), Event::Renew(renew)).await.map_err(status)?;
        let signed = self.0.pki.sign(signing, holder, now);
        let certificate_der = signed.map_err(|error| Status::internal(chain(&error)))?;
        Ok(Response::new(RenewResponse { certificate_der }))
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
