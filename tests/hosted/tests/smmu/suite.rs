//! All that holds of SMMUv3 whatever the hardware and the stream table are like.

mod bring_up;
mod contexts;
mod events;
mod nested;
mod replace;
mod tables;
