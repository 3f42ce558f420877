//! `netctl show`: prints the text of a job.

use super::diff::{JobAt, side};
use crate::{
    client::{Client, ServerArgs},
    print::{self, Format},
};

/// Print the text of a job, now or in an older version
///
/// It is what `netctl apply -f` takes. Viewers are not shown the values of variables.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  netctl show blog\n  netctl show blog@3 > blog.yaml")]
pub(super) struct Args {
    /// The job, or one of its versions
    #[arg(value_name = "JOB[@VERSION]", value_parser = JobAt::or_in_force)]
    job: JobAt,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(args: Args, format: Format) -> anyhow::Result<()> {
    let client = Client::connect(&args.server).await?;
    let text = side(&client, &args.job).await?.text;
    let format = if format == Format::Table { Format::Yaml } else { format };
    print::to_stdout(|out| print::value(out, format, &text))
}
