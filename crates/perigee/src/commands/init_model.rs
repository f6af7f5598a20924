//! `perigee init-model`: a random model as a checkpoint directory with a byte-level tokenizer and the default chat template.

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use perigee_model::{ModelSpec, WeightSource};
use perigee_text::template::DEFAULT_TEMPLATE;
use perigee_text::{SpecialIds, byte_level_config, byte_level_tokenizer};

/// Arguments of `init-model`.
#[derive(clap::Args)]
pub(crate) struct InitModelArgs {
    /// What to write: `random:PRESET[@SEED]`.
    #[arg(long, default_value = "random:tiny")]
    model: String,
    /// Directory to make; it must not exist or be empty.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print one JSON object when done.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InitModelArgs) -> anyhow::Result<()> {
    let spec: ModelSpec = args.model.parse()?;
    let source = WeightSource::open(&spec)?;
    let config = source.config();
    let special = SpecialIds { bos: config.bos, eos: config.eos.first().copied(), pad: config.pad };
    let tokenizer = byte_level_tokenizer(config.vocab as u32, special)?;
    let names = byte_level_config(config.vocab as u32, special)?;
    let shown = std::io::stderr().is_terminal();
    let mut written = 0;
    perigee_model::init_model(&args.directory, &spec, &mut |done, all| {
        written = done;
        if shown {
            eprint!("\r{} of {} MB", done / 1_000_000, all / 1_000_000);
        }
    })?;
    if shown {
        eprintln!();
    }
    for (name, content) in [("tokenizer.json", &tokenizer), ("tokenizer_config.json", &names)] {
        let path = args.directory.join(name);
        std::fs::write(&path, serde_json::to_vec_pretty(content)?).with_context(|| path.display().to_string())?;
    }
    let path = args.directory.join("chat_template.jinja");
    std::fs::write(&path, DEFAULT_TEMPLATE).with_context(|| path.display().to_string())?;
    if args.json {
        println!("{}", serde_json::json!({"directory": args.directory, "bytes": written}));
    } else {
        println!("wrote {} ({} bytes of weights) to {}", args.model, written, args.directory.display());
    }
    Ok(())
}
