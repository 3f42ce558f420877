//! The present stream to the server, as far as the agent's own words go into it.

use hextet_api::v1::{NodeLeaving, NodeReport, node_report};
use tokio::sync::mpsc::{OwnedPermit, Sender};
use tonic::transport::Channel;

use crate::attach::report;

/// The present stream, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Reports(Option<(Sender<NodeReport>, Channel)>);

impl Reports {
    pub(crate) fn attached(&mut self, stream: Sender<NodeReport>, channel: Channel) {
        self.0 = Some((stream, channel));
    }

    pub(crate) fn detached(&mut self) {
        self.0 = None;
    }

    /// Another connection for calls beside the stream.
    pub(crate) fn use_channel(&mut self, next: Channel) {
        if let Some((_, channel)) = &mut self.0 {
            *channel = next;
        }
    }

    pub(crate) fn channel(&self) -> Option<Channel> {
        self.0.as_ref().map(|(_, channel)| channel.clone())
    }

    /// The last word to the server: the node is taken down. False when there is no stream.
    pub(crate) async fn leave(&self, leaving: NodeLeaving) -> bool {
        let Some((stream, _)) = &self.0 else { return false };
        stream.send(report(node_report::Report::Leaving(leaving))).await.is_ok()
    }

    /// Room in the stream, once there is any, if there is something to say; else waits for ever.
    pub(crate) fn room(
        &self,
        is_something_to_say: bool,
    ) -> impl Future<Output = OwnedPermit<NodeReport>> + use<> {
        let stream = self.0.as_ref().filter(|_| is_something_to_say).map(|(stream, _)| stream.clone());
        async move {
            if let Some(stream) = stream
                && let Ok(permit) = stream.reserve_owned().await
            {
                return permit;
            }
            // The end of a stream is told as an event.
            std::future::pending().await
        }
    }
}
