"""What a plan has to find in each class of the zoo, and why the rest stays dense."""

# Class -> number of like sites, block class, and tokens that may bypass + tokens in the same stream that never do; or `dense`: blocks of
# text and reference images, and the control blocks of WanVACE, which return two streams.
SITES = {
    "AceStepTransformer1DModel": "4 AceStepTransformerBlock 20+0",
    "AllegroTransformer3DModel": "2 AllegroTransformerBlock 36+0",
    "AnyFlowFARTransformer3DModel": "2 AnyFlowTransformerBlock 32+0",
    "AnyFlowTransformer3DModel": "2 AnyFlowTransformerBlock 36+0",
    "AuraFlowTransformer2DModel": "2 AuraFlowJointTransformerBlock 20+0, 2 AuraFlowSingleTransformerBlock 20+13",
    "BriaFibo2Transformer2DModel": "2 BriaFibo2TransformerBlock 20+0, 2 BriaFibo2PerceiverLayer dense, 4 BriaFibo2TransformerBlock 20+6",
    "BriaFiboTransformer2DModel": "2 BriaFiboTransformerBlock 20+0, 2 BriaFiboSingleTransformerBlock 20+7",
    "BriaTransformer2DModel": "2 BriaTransformerBlock 20+0, 2 BriaSingleTransformerBlock 20+0",
    "ChromaTransformer2DModel": "2 ChromaTransformerBlock 20+0, 2 ChromaSingleTransformerBlock 20+7",
    "ChronoEditTransformer3DModel": "2 WanTransformerBlock 40+0",
    "CogVideoXTransformer3DModel": "2 CogVideoXBlock 40+0",
    "CogView3PlusTransformer2DModel": "2 CogView3PlusTransformerBlock 20+0",
    "CogView4Transformer2DModel": "2 CogView4TransformerBlock 20+0",
    "ConsisIDTransformer3DModel": "4 ConsisIDBlock 40+0",
    "Cosmos3OmniTransformer": "2 Cosmos3VLTextMoTDecoderLayer 36+0",
    "CosmosTransformer3DModel": "2 CosmosTransformerBlock 36+0",
    "DiTTransformer2DModel": "2 BasicTransformerBlock 16+0",
    "DreamLiteTransformer2DModel": "2 BasicTransformerBlockDreamLite 20+0",
    "EasyAnimateTransformer3DModel": "4 EasyAnimateTransformerBlock 36+0",
    "ErnieImageTransformer2DModel": "2 ErnieImageSharedAdaLNBlock 20+7",
    "Flux2Transformer2DModel": "2 Flux2TransformerBlock 20+0, 2 Flux2SingleTransformerBlock 20+7",
    "Flux3Transformer2DModel": "4 Flux3ModeTransformerBlock dense, 2 Flux3ModeTransformerBlock 20+0, 2 Flux3SingleTransformerBlock 20+9",
    "FluxTransformer2DModel": "2 FluxTransformerBlock 20+0, 2 FluxSingleTransformerBlock 20+0",
    "GlmImageTransformer2DModel": "2 GlmImageTransformerBlock 20+0",
    "HeliosTransformer3DModel": "2 HeliosTransformerBlock 18+15",
    "HiDreamImageTransformer2DModel": "2 HiDreamImageTransformerBlock 16+0, 2 HiDreamImageSingleTransformerBlock 16+15",
    "HunyuanDiT2DModel": "6 HunyuanDiTBlock 20+0",
    "HunyuanImageTransformer2DModel": "2 HunyuanImageIndividualTokenRefinerBlock dense, 2 HunyuanImageTransformerBlock 20+0, "
    "2 HunyuanImageSingleTransformerBlock 20+0",
    "HunyuanVideo15Transformer3DModel": "2 HunyuanVideo15IndividualTokenRefinerBlock dense, 2 HunyuanVideo15TransformerBlock 24+0",
    "HunyuanVideoFramepackTransformer3DModel": "2 HunyuanVideoIndividualTokenRefinerBlock dense, 2 HunyuanVideoTransformerBlock 18+15, "
    "2 HunyuanVideoSingleTransformerBlock 18+15",
    "HunyuanVideoTransformer3DModel": "2 HunyuanVideoIndividualTokenRefinerBlock dense, 2 HunyuanVideoTransformerBlock 18+0, "
    "2 HunyuanVideoSingleTransformerBlock 18+0",
    "Ideogram4Transformer2DModel": "2 Ideogram4TransformerBlock 27+0",
    "JoyImageEditPlusTransformer3DModel": "2 JoyImageEditPlusTransformerBlock 25+0",
    "JoyImageEditTransformer3DModel": "2 JoyImageTransformerBlock 24+0",
    "Kandinsky5Transformer3DModel": "2 Kandinsky5TransformerEncoderBlock dense, 2 Kandinsky5TransformerDecoderBlock 18+0",
    "Kandinsky6Transformer3DModel": "4 Kandinsky6TransformerEncoderBlock dense, 2 Kandinsky6FusedTransformerDecoderBlock 18+0",
    "Krea2Transformer2DModel": "4 Krea2TextFusionBlock dense, 2 Krea2TransformerBlock 28+6",
    "LTX2VideoTransformer3DModel": "2 LTX2VideoTransformerBlock 40+0",
    "LTXVideoTransformer3DModel": "2 LTXVideoTransformerBlock 40+0",
    "LatteTransformer3DModel": "2 BasicTransformerBlock 12+0, 2 BasicTransformerBlock 5+0",
    "LongCatAudioDiTTransformer": "2 AudioDiTBlock 17+0",
    "LongCatImageTransformer2DModel": "2 LongCatImageTransformerBlock 20+0, 2 LongCatImageSingleTransformerBlock 20+0",
    "Lumina2Transformer2DModel": "2 Lumina2TransformerBlock dense, 2 Lumina2TransformerBlock 20+0, 2 Lumina2TransformerBlock 20+6",
    "LuminaNextDiT2DModel": "2 LuminaNextDiTBlock 20+0",
    "MiniMaxH3Transformer3DModel": "2 MiniMaxH3TokenRefinerBlock dense, 2 MiniMaxH3TransformerBlock 18+17",
    "MiniMaxMusic3Transformer1DModel": "2 MiniMaxMusic3TransformerBlock 17+1",
    "MochiTransformer3DModel": "3 MochiTransformerBlock 40+0",
    "MotifVideoTransformer3DModel": "2 MotifVideoTransformerBlock 40+0, 4 MotifVideoSingleTransformerBlock 40+0",
    "NucleusMoEImageTransformer2DModel": "6 NucleusMoEImageTransformerBlock 20+0",
    "OmniGenTransformer2DModel": "2 OmniGenBlock 20+8",
    "OvisImageTransformer2DModel": "2 OvisImageTransformerBlock 20+0, 2 OvisImageSingleTransformerBlock 20+0",
    "PRXTransformer2DModel": "2 PRXBlock 20+0",
    "PixArtTransformer2DModel": "2 BasicTransformerBlock 20+0",
    "QwenImage21Transformer2DModel": "3 QwenImage21TransformerBlock 24+7",
    "QwenImageTransformer2DModel": "3 QwenImageTransformerBlock 20+0",
    "RFD4ProteinaTransformer": "8 RFD4ProteinaTrunkLayer 20+0",
    "SD3Transformer2DModel": "5 JointTransformerBlock 20+0",
    "SanaWMLTX2RefinerTransformer3DModel": "3 SanaWMLTX2RefinerTransformerBlock 24+0",
    "SkyReelsV2Transformer3DModel": "3 SkyReelsV2TransformerBlock 40+0",
    "StableAudio3DiTModel": "3 StableAudio3DiTBlock 20+3",
    "StableAudioDiTModel": "2 StableAudioDiTBlock 20+1",
    "T5FilmDecoder": "2 DecoderLayer 20+0",
    "Transformer2DModel": "2 BasicTransformerBlock 20+0",
    "TransformerTemporalModel": "2 BasicTransformerBlock 10+0",
    "WanAnimateTransformer3DModel": "4 WanTransformerBlock 36+0",
    "WanTransformer3DModel": "3 WanTransformerBlock 40+0",
    "WanVACETransformer3DModel": "2 WanVACETransformerBlock dense, 4 WanTransformerBlock 40+0",
    "ZImageTransformer2DModel": "2 ZImageTransformerBlock 32+0, 2 ZImageTransformerBlock dense, 3 ZImageTransformerBlock 32+96",
}

# Classes without a block that can be routed -> the reason the plan gives, with the measured error where the proof failed.
_NO_SET = r"\(.+\): its tokens are no set: permuting them changes the output by [0-9.]+e[+-]\d\d of its spread \(tolerance 1e-04\)"
DENSE = {
    "Kandinsky6SRTransformer3DModel": "in any order .*, but not fewer of them",  # attention is chosen by blocks of 64 tokens
    "PriorTransformer": "a single token that stems from the latent",  # it denoises one image embedding
    "SanaTransformer2DModel": _NO_SET,  # depthwise convolution over the token grid
    "SanaVideoTransformer3DModel": _NO_SET,  # depthwise convolution over the token grid, and one over frames
    "SanaWMTransformer3DModel": _NO_SET,  # a recurrence over frames, and convolutions
    "WanAnimate2Transformer3DModel": _NO_SET,  # rotary positions counted inside attention, from the grid's size
}

# Routed classes whose samples cannot run one by one -> what a call with timesteps of several regions says. Only batch axis 0 and list
# entries are samples.
_RAISES = "one sample alone made the model raise "
NOT_SPLIT = {
    "AnyFlowFARTransformer3DModel": _RAISES + "RuntimeError: Sizes of tensors must match",  # the batch is axis 1 of its cache
    "Cosmos3OmniTransformer": "none of its inputs can be split into samples",  # one packed sequence; a timestep a token
    "HiDreamImageTransformer2DModel": _RAISES + "IndexError: index 2 is out of bounds",  # the batch is axis 1 of the Llama states
    "MiniMaxH3Transformer3DModel": "none of its inputs can be split into samples",  # a timestep a noise level, not one a sample
    "OmniGenTransformer2DModel": "one sample alone gave another output",  # a dict says by number which sample has an image
    "QwenImage21Transformer2DModel": "its tokens are no set",  # a batch cannot even be routed, see test_zoo.py
    "TransformerTemporalModel": "none of its inputs can be split into samples",  # axis 0 is samples times frames
}

# Classes that do not compile without a graph break -> what they decide on the content of tensors. Of GlmImage this is our guard alone.
NOT_COMPILED = {
    "BriaFibo2Transformer2DModel": "lengths of prompts",
    "GlmImageTransformer2DModel": "how many prior tokens are dropped",
    "HiDreamImageTransformer2DModel": "tokens of each expert",
    "HunyuanImageTransformer2DModel": "lengths of prompts",
    "HunyuanVideo15Transformer3DModel": "whether there are images",
    "Lumina2Transformer2DModel": "lengths of prompts",
    "OmniGenTransformer2DModel": "places of images",
    "QwenImage21Transformer2DModel": "lengths of prompts",
}

# Model classes of the package that denoise nothing -> why.
NO_DENOISERS = {
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive language model over codebooks: no noise, no timestep",
}

# As `SITES`, for the hand-written models.
HAND_WRITTEN = {
    "AddcmulDiT": "4 ParallelBlock 20+0",
    "DataclassDiT": "3 _DiTBlock 20+0",
    "DiT": "4 DiTBlock 16+0",
    "DictDiT": "3 MapsBlock 20+0",
    "DiffusionPolicy": "3 TransformerDecoderLayer 16+0",
    "DiffusionForcing": "3 TokenwiseBlock 20+0",
    "Eva": "3 EvaBlock 20+1",
    "EvaBlockDenoiser": "3 EvaBlock 20+0",
    "EvaPrefixDenoiser": "3 EvaBlock 20+3",
    "F5TTS": "3 F5Block 24+0",
    "Flux": "2 DoubleStreamBlock 20+0, 3 SingleStreamBlock 20+7",
    "InPlaceDiT": "3 InPlaceBlock 20+0",
    "LatentInterface": "1 ReadWriteBlock dense, 5 ReadWriteBlock 7+0, 2 ReadWriteBlock 20+0",
    "Latte": "2 _DiTBlock 20+0, 2 _DiTBlock 7+0",
    "LinearDiT": "3 LinearBlock 20+0",
    "LucidDenoiser": "3 LucidAttention 20+2, 3 Sequential 20+2",
    "MDM": "3 TransformerEncoderLayer 20+1",
    "MDMBatchFirst": "3 TransformerEncoderLayer 20+1",
    "MDMPadded": "3 TransformerEncoderLayer 20+1",
    "MDT": "4 MDTBlock 15+0, 2 MDTBlock dense",
    "MMDiT": "4 JointBlock 20+0",
    "MaskDiT": "3 DiTBlock 12+0, 2 DiTBlock 12+8",
    "MoEDiT": "3 MoEBlock 20+0",
    "NestedDiT": "6 DiTBlock 20+0",
    "NestedInputsDiT": "3 CrossBlock 20+0",
    "NextDiT": "3 NextDiTBlock 16+4",
    "NextDiTBatch": "3 NextDiTBlock 20+0",
    "OverwritingDiT": "3 OverwritingBlock 20+0",
    "PackedDiT": "3 PackedBlock 19+0",
    "ParallelDiT": "4 ParallelBlock 20+0",
    "PixArt": "3 PixArtBlock 20+0",
    "RegisterDiT": "3 RotaryBlock 20+5",
    "SequentialDiT": "3 PairBlock 20+0",
    "SharedDiT": "5 DiTBlock 20+0",
    "SiTREPA": "4 DiTBlock 20+0",
    "StableAudio": "3 StableAudioBlock 24+3",
    "TimmBlockDenoiser": "3 Block 20+1",
    "TokenwiseDiT": "3 TokenwiseBlock 20+0",
    "TupleDiT": "3 AuxBlock 20+0",
    "TwinDiT": "4 ParallelBlock 20+0",
    "UViT": "5 UViTBlock 20+8",
    "ViTWithRegisters": "3 Block 20+4",
    "VisionTransformer": "3 Block 20+1",
}
HAND_WRITTEN_DENSE = {
    "HDiT": "No block was found .* takes tokens \\(b n c\\)",  # its streams are grids, b h w c
    "PostNormDiT": "not simply added to the stream",  # x + norm(block(x)): zero is no neutral update there
    "WanOriginal": _NO_SET,  # rotary positions counted inside attention, from the grid's size
}
