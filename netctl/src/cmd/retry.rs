//! `netctl retry`: tries again what of a pod has failed.

use std::fmt;

use hextet_api::v1;
use serde::Serialize;

use crate::{
    client::{Client, ServerArgs, request},
    print::{self, Format},
};

/// Try again what of a pod has failed
///
/// Each step that has failed is tried at once, with all its attempts, also a hook that has failed for good. Steps that are done are not
/// touched, and nor are tasks, which are started again by themselves. `netctl why` says what has failed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  netctl retry pod/hello-web-x7k2p")]
pub(super) struct Args {
    /// POD or pod/POD, as `netctl pods` lists it
    pod: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Serialize)]
struct Retried {
    pod: String,
    steps: Vec<String>,
}

impl fmt::Display for Retried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.steps.as_slice() {
            [] => write!(f, "pod/{}: no step of it has failed", self.pod),
            steps => write!(f, "pod/{}: {} tried again", self.pod, steps.join(", ")),
        }
    }
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let pod = args.pod.strip_prefix("pod/").unwrap_or(&args.pod).to_owned();
    let asked = request(v1::RetryPodRequest { pod: pod.clone() });
    let answer = client.answer(client.cluster().retry_pod(asked)).await?;
    print::to_stdout(|out| print::one(out, format, &Retried { pod, steps: answer.steps }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_tried_again_or_that_nothing_is() {
        let told = |steps: &[&str]| {
            let steps = steps.iter().map(|step| (*step).to_owned()).collect();
            Retried { pod: "a-b-00000".into(), steps }.to_string()
        };
        assert_eq!(told(&["link", "migrate"]), "pod/a-b-00000: link, migrate tried again");
        assert_eq!(told(&[]), "pod/a-b-00000: no step of it has failed");
    }
}
